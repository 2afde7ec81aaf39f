"""The space that `gptjax sweep` searches around the quickstart (NOTES.md, Sweep)."""


def get_space():
    return {
        "optimizer.peak_learning_rate": ("log", 2e-3, 1e-1),
        "optimizer.warmup_steps": [10, 30, 60],
    }
