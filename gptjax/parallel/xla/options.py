"""XLA's options for compiling the train step: `compiler_options`, for example `xla_tpu_scoped_vmem_limit_kib=98304`.

The options belong to the config rather than to the environment, so `gptjax plan` compiles the same program as a run.
"""

import re
from typing import TYPE_CHECKING

from gptjax.errors import Refused

if TYPE_CHECKING:  # configs are parsed before JAX is imported
    import jax

PREFIXES = {"tpu": "xla_tpu_", "gpu": "xla_gpu_", "cuda": "xla_gpu_", "cpu": "xla_cpu_"}  # by JAX's platform


def options(text: str) -> dict[str, str]:
    """Parses `NAME=VALUE NAME=VALUE`, or an empty text. Raises: Refused."""
    found = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"xla_\w+", name):
            raise Refused(f'compiler_options="{text}" must be xla_NAME=VALUE, separated by spaces; found "{word}".')
        if name in found:
            raise Refused(
                f'compiler_options="{text}" must name an option once; found {name}={found[name]} and {name}={value}; '
                f"keep one {name}."
            )
        found[name] = value
    return found


def compile(lowered: "jax.stages.Lowered", text: str, platform: str) -> "jax.stages.Compiled":
    """Compiles a program with these options.

    Options with the prefix of another platform are skipped, since a config serves all platforms.

    Raises: Refused, for an option or a value that the compiler does not know.
    """
    import jax

    elsewhere = tuple(prefix for prefix in PREFIXES.values() if prefix != PREFIXES.get(platform))
    chosen = {name: value for name, value in options(text).items() if not name.startswith(elsewhere)}
    try:
        return lowered.compile(compiler_options=chosen)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" in str(error) or "While setting option" in str(error):
            why = str(error).splitlines()[0].partition(": ")[2]
            raise Refused(f'compiler_options="{text}" is refused by the compiler for {platform}: {why}') from error
        raise


def check(text: str, platform: str) -> None:
    """Compiles a small program with the options, to find what the compiler refuses before anything is prepared.

    Raises: Refused.
    """
    import jax

    cache = jax.config.jax_compilation_cache_dir
    if text:
        try:
            jax.config.update("jax_compilation_cache_dir", None)  # compiling would create a cache inside a workdir
            compile(jax.jit(lambda: 0).lower(), text, platform)
        finally:
            jax.config.update("jax_compilation_cache_dir", cache)
