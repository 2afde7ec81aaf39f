"""Options of XLA, the compiler, for the train step: `compiler_options`, as in `xla_tpu_scoped_vmem_limit_kib=98304`.

A part of the config and not of the environment, so that `gptjax plan` compiles what a run will, and a resumed run what
the first one did.
"""

import re

import jax

from gptjax.errors import Refused

PREFIXES = {"tpu": "xla_tpu_", "gpu": "xla_gpu_", "cuda": "xla_gpu_", "cpu": "xla_cpu_"}  # by JAX's platform


def options(text: str) -> dict[str, str]:
    """Of `NAME=VALUE,NAME=VALUE`, or of nothing. Raises: Refused."""
    words = [word.strip() for word in text.split(",")] if text else []
    for word in words:
        if not re.fullmatch(r"xla_\w+=[^=]+", word):
            raise Refused(
                f'compiler_options="{text}" has "{word}", which is not of the form xla_NAME=VALUE; commas stand between '
                "them."
            )
    return dict(word.split("=") for word in words)


def compile(lowered: jax.stages.Lowered, text: str, platform: str) -> jax.stages.Compiled:
    """The program with these options, but for those whose name is of another platform: a config is for all.

    Raises: Refused, for an option or a value that the compiler does not know.
    """
    elsewhere = tuple(set(PREFIXES.values()) - {PREFIXES[platform]})
    its = {name: value for name, value in options(text).items() if not name.startswith(elsewhere)}
    try:
        return lowered.compile(compiler_options=its)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" in str(error) or "While setting option" in str(error):
            reason = str(error).splitlines()[0].partition(": ")[2]
            raise Refused(f'compiler_options="{text}" is refused by the compiler of this {platform}: {reason}') from error
        raise
