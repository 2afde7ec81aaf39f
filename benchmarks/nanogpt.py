"""gptjax's train step against nanoGPT's, in PyTorch, eager and compiled.

    git clone https://github.com/karpathy/nanoGPT DIR
    python -m venv ENV && ENV/bin/pip install torch numpy
    python -m benchmarks.nanogpt --source=DIR --python=ENV/bin/python [--shape=W1|W2] [--rounds=20] [--steps=3]

Its model with biases, as GPT-2 has them, its optimizer, and the step of its train.py: forward, backward, clipping,
AdamW, gradients let go. Its GELU is the exact one and ours GPT-2's tanh approximation: each framework's own. The
compiled one needs a C++ compiler. What else is counted, and how it is timed: see peer.py.
"""

import pathlib
import shutil
import sys

from benchmarks import peer


def build(shape: peer.Shape, source: str, compiled: bool):
    """(parameters, step) of nanoGPT's model."""
    import torch

    sys.path.insert(0, source)
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(
        n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width, block_size=shape.length,
        vocab_size=shape.vocab, dropout=0.0, bias=True,
    ))  # fmt: skip
    optimizer = model.configure_optimizers(peer.DECAY, peer.RATE, (peer.BETA1, peer.BETA2), "cpu")
    forward = torch.compile(model) if compiled else model
    tokens = torch.from_numpy(peer.tokens(shape)).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        _, loss = forward(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), peer.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return sum(p.numel() for p in model.parameters()), step


def main():
    parser = peer.arguments(__doc__)
    parser.add_argument("--source", type=pathlib.Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--python", default=sys.executable, help="of an environment with torch")
    parser.add_argument("--compiled", action="store_true", help="of the peer's process: torch.compile")
    args = parser.parse_args()
    if args.serve:
        peer.serve(lambda: build(peer.SHAPES[args.shape], str(args.source), args.compiled))
        return
    if not (args.source / "model.py").exists():
        parser.error(f"--source={args.source} has no model.py: give a checkout of nanoGPT.")
    eager = [args.python, "-m", "benchmarks.nanogpt", "--source", str(args.source.resolve())]
    peers = {"nanoGPT eager": eager}
    if shutil.which("c++") or shutil.which("g++"):
        peers["nanoGPT compiled"] = [*eager, "--compiled"]
    else:
        print("no C++ compiler on the PATH: nanoGPT's compiled step is left out")
    peer.compare(args, peers, biases=True)


if __name__ == "__main__":
    main()
