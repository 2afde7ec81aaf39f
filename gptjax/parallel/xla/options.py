"""Options of XLA, the compiler, for the train step: `compiler_options`, as in `xla_tpu_scoped_vmem_limit_kib=98304`.

A part of the config and not of the environment, so that `gptjax plan` compiles what a run will.
"""

import re
from typing import TYPE_CHECKING

from gptjax.errors import Refused

if TYPE_CHECKING:  # configs are parsed before JAX is imported
    import jax

PREFIXES = {"tpu": "xla_tpu_", "gpu": "xla_gpu_", "cuda": "xla_gpu_", "cpu": "xla_cpu_"}  # by JAX's platform


def options(text: str) -> dict[str, str]:
    """Of `NAME=VALUE NAME=VALUE`, or of nothing. Raises: Refused."""
    found = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"xla_\w+", name):
            raise Refused(
                f'compiler_options="{text}" has "{word}", which is not of the form xla_NAME=VALUE; spaces stand between'
                " them."
            )
        if name in found:
            raise Refused(f'compiler_options="{text}" has {name} twice, as {found[name]} and as {value}: keep one.')
        found[name] = value
    return found


def compile(lowered: "jax.stages.Lowered", text: str, platform: str) -> "jax.stages.Compiled":
    """The program with these options, but for those with the prefix of another platform: a config is for all.

    Raises: Refused, for an option or a value that the compiler does not know.
    """
    import jax

    elsewhere = tuple(prefix for prefix in PREFIXES.values() if prefix != PREFIXES.get(platform))
    its = {name: value for name, value in options(text).items() if not name.startswith(elsewhere)}
    try:
        return lowered.compile(compiler_options=its)
    except jax.errors.JaxRuntimeError as error:
        if "compile option" in str(error) or "While setting option" in str(error):
            why = str(error).splitlines()[0].partition(": ")[2]
            raise Refused(f'compiler_options="{text}" is refused by the compiler of this {platform}: {why}') from error
        raise


def check(text: str, platform: str) -> None:
    """What the compiler would refuse of a train step it is asked of a small program, before anything is prepared.

    Raises: Refused.
    """
    import jax

    cache = jax.config.jax_compilation_cache_dir
    if text:
        try:
            jax.config.update("jax_compilation_cache_dir", None)  # it may be within a workdir, and would be made
            compile(jax.jit(lambda: 0).lower(), text, platform)
        finally:
            jax.config.update("jax_compilation_cache_dir", cache)
