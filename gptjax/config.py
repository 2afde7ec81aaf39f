"""The public door of the configuration: what a config file imports."""

from gptjax.training.config.schema import Config, default, parse

__all__ = ["Config", "default", "parse"]
