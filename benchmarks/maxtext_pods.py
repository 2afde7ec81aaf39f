"""The same training steps as gptjax and MaxText compile them for pods of TPUs: memory, and a floor on time.

    python3.12 -m venv ENV && ENV/bin/pip install maxtext libtpu jax flax optax orbax-checkpoint ...
    python -m benchmarks.maxtext_pods --python=ENV/bin/python [--row=A] [--row=D] [--options=]

No TPU is needed; libtpu is, of one version in both environments. MaxText does not declare what it imports: see its base
requirements. Its settings are those that it publishes for these machines, but for AdamW in all rows and the compiler's
options, which are the same on both sides; its own `train_compile` compiles its own step, and what the compiler says of
it is read by the reader of `gptjax plan`: the peak's bytes of a chip, and the ceiling on MFU, which is the model's
FLOPs by our count over the compiler's cycles, with Pallas kernels at the peak. Some three minutes a row and side.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import types
from typing import NamedTuple

from gptjax.parallel.hardware import GIB
from gptjax.parallel.xla import analysis, hlo, options
from gptjax.planning import aot, topology
from gptjax.planning.plan import compute_floor, environment, plan
from gptjax.planning.topology import Topology
from gptjax.training.config import files
from gptjax.training.config.schema import Config

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


class Row(NamedTuple):
    """A step on a machine, for both frameworks."""

    about: str
    topology: Topology
    machine: str  # as MaxText calls it
    config: str
    ours: dict[str, str]
    theirs: dict[str, object]


V5P, V6E, V5E = topology.parse("v5p:8x8x8", 1), topology.parse("v6e:16x16", 1), topology.parse("v5e:2x4", 1)
B = {"model_name": "llama2-70b", "max_target_length": 4096, "remat_policy": "save_dot_except_mlpwi"}
C = {
    "num_layers": 96, "num_heads": 96, "embed_dim": 12288, "remat": "full,query=save,key=save,value=save,context=save",
}  # fmt: skip
D = {
    "decoder_block": "gpt3", "base_num_decoder_layers": 12, "base_num_query_heads": 12, "base_num_kv_heads": 12,
    "head_dim": 64, "base_emb_dim": 768, "base_mlp_dim": 3072, "mlp_activations": "[gelu]", "vocab_size": 50304,
    "trainable_position_size": 1024, "logits_via_embedding": True, "normalize_embedding_logits": False,
    "fused_qkv": True, "per_device_batch_size": 16, "max_target_length": 1024, "remat_policy": "minimal",
}  # fmt: skip
ROWS = {
    "A": Row(
        "Llama 3.1 8B, 4 × 8192 a chip, products of attention and inputs of layers offloaded",
        V6E, "v6e-256", "llama_8b.py",
        {
            "batch_size": "1024",
            "model.remat": "full,query=offload,key=offload,value=offload,context=offload,block_input=offload",
        },
        {
            "model_name": "llama3.1-8b", "per_device_batch_size": 4, "max_target_length": 8192,
            "remat_policy": "custom", "decoder_layer_input": "offload", "out_proj": "offload",
            "query_proj": "offload", "key_proj": "offload", "value_proj": "offload",
        },
    ),
    "B": Row("Llama 2 70B, 2 × 4096 a chip", V5P, "v5p-1024", "llama_70b.py", {}, B | {"per_device_batch_size": 2}),
    "B8": Row(
        "Llama 2 70B, 8 × 4096 a chip", V5P, "v5p-1024", "llama_70b.py",
        {"batch_size": "4096", "model.remat": "full"}, B | {"per_device_batch_size": 8},
    ),
    "C": Row(
        "GPT-3 175B, a sequence of 4096 on 2 chips, data over slices, fsdp 128, tensor 2",
        topology.parse("v5p:4x8x8", 2), "v5p-512", "gpt2_1558m.py",
        {f"model.{key}": str(value) for key, value in C.items()}
        | {"seq_len": "4096", "batch_size": "256", "grad_accum_steps": "1", "mesh.fsdp": "128", "mesh.tensor": "2"},
        {
            "model_name": "gpt3-175b", "per_device_batch_size": 0.5, "max_target_length": 4096,
            "ici_fsdp_parallelism": 128, "ici_tensor_parallelism": 2, "dcn_data_parallelism": 2,
            "remat_policy": "save_dot_with_context_except_mlp", "allow_split_physical_axes": True,
        },
    ),
    "D": Row(
        "GPT-2 124M, 16 × 1024 a chip, fsdp", V5E, "v5e-8", "gpt2_124m.py",
        {"batch_size": "128", "grad_accum_steps": "1"}, D,
    ),
    "D data": Row(
        "the same, data", V5E, "v5e-8", "gpt2_124m.py",
        {
            "batch_size": "128", "grad_accum_steps": "1", "mesh.data": "8", "loss.num_chunks": "2",
            "model.remat": "full,context=save,mlp_up=save",
        },
        D | {"ici_data_parallelism": 8, "ici_fsdp_parallelism": 1},
    ),
}  # fmt: skip


def maxtext(row: Row, python: str, config: Config, ours: dict) -> str:
    """Returns the compiler's figures for MaxText's step; exits if MaxText fails for another reason than memory.

    ours: the plan of the same config; MaxText's step is taken to do the same FLOPs.
    """
    flags = " ".join(f"--{name}={value}" for name, value in options.options(config.compiler_options).items())
    find = "import importlib.util; print(importlib.util.find_spec('maxtext').submodule_search_locations[0])"
    package = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        settings = {
            "run_name": "peer", "base_output_directory": name, "enable_checkpointing": False, "hardware": "tpu",
            "dataset_type": "synthetic", "attention": "flash", "use_iota_embed": True, "opt_type": "adamw",
            "skip_jax_distributed_system": True, "jax_cache_dir": "", "compile_topology": row.machine,
            "compile_topology_num_slices": row.topology.slices, "override_model_config": True,
        } | row.theirs  # fmt: skip
        if flags:
            settings["compile_xla_flags"] = flags
        command = [python, "-m", "maxtext.trainers.pre_train.train_compile", f"{package}/configs/base.yml"]
        env = environment(folder)
        del env["PYTHONPATH"]  # of this environment
        ended = subprocess.run(
            [*command, *(f"{key}={value}" for key, value in settings.items())],
            env=env, cwd=name, capture_output=True, text=True,
        )  # fmt: skip
        if ended.returncode:
            sizes = analysis.out_of_memory(ended.stderr)
            if not sizes:
                sys.exit(f"{ended.stderr[-3000:]}\nMaxText ended with code {ended.returncode}: see above.")
            return f"does not fit: {sizes[0] / GIB:.1f} of {sizes[1] / GIB:.1f} GiB"
        said = re.search(r"Memory analysis: .*", ended.stdout)[0]
        stats = {key: int(value) for key, value in re.findall(r"(\w+_in_bytes)=(\d+)", said)}
        memory = analysis.laid_out(types.SimpleNamespace(**stats))
        program = hlo.parse(aot.text_of(folder, "after_codegen"))
        kernels = [kernel._asdict() for kernel in analysis.kernels(program, window=0)]
        found = {"source": "compiled", "cycles": analysis.cycles(program), "kernels": kernels}
        found["tokens_per_step"] = config.batch_size * config.seq_len
        floor, warnings = compute_floor(config, row.topology, found)
        ceiling = ours["mfu_ceiling"] * ours["floor_step_seconds"] / floor if floor else None
        return shown(memory.peak, memory.host, ceiling, "; ".join(warnings))


def shown(peak: int, host: int, ceiling: float | None, warnings: str = "") -> str:
    on_host = f" and {host / GIB:.1f} of the host" if host else ""
    return f"{peak / GIB:.1f} GiB a chip{on_host}, {f'{ceiling:.1%}' if ceiling else 'no floor'} {warnings}".strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with maxtext and libtpu")
    parser.add_argument("--row", action="append", choices=ROWS, help="all, where none is named")
    parser.add_argument("--options", help="of the compiler, in place of our configs' (gptjax/parallel/xla/options.py)")
    args = parser.parse_args()
    for name in args.row or ROWS:
        row = ROWS[name]
        changes = {} if args.options is None else {"compiler_options": args.options}
        config = files.load(str(CONFIGS / row.config), row.ours | changes)
        made = plan(config, row.topology)
        print(f"{name}: {row.about}; {row.topology.name} × {row.topology.slices}")
        print(f"   gptjax   {shown(made['hbm_bytes'], made['host_bytes'], made['mfu_ceiling'])}", flush=True)
        print(f"   MaxText  {maxtext(row, args.python, config, made)}", flush=True)


if __name__ == "__main__":
    main()
