"""The products of experts against a dense reference in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import mesh_of

from gptjax.models import experts

T, E, K, D, F = 40, 6, 2, 16, 24


def operands(dtype="float32"):
    """x [T, D], two matrices, weights and choices [T, k]; experts 1 and 4 are chosen by no token."""
    draw = np.random.default_rng(0)
    choices = np.stack([draw.permutation([0, 2, 3, 5])[:K] for _ in range(T)])
    arrays = [draw.normal(size=size) for size in ((T, D), (E, D, F), (E, F, D), (T, K))]
    return [jnp.asarray(array, dtype) for array in arrays], jnp.asarray(choices, jnp.int32)


def grouped(x_TD, up_EDF, down_EFD, weights_Tk, experts_Tk, block):
    slots = experts.make_slots(experts_Tk, E, block)
    u_SF = jnp.tanh(experts.grouped_product(experts.filled(x_TD, slots), up_EDF, slots))
    return experts.collected(experts.grouped_product(u_SF, down_EFD, slots), weights_Tk, slots)


def dense(x_TD, up_EDF, down_EFD, weights_Tk, experts_Tk):
    y_TED = jnp.einsum("TEF,EFD->TED", jnp.tanh(jnp.einsum("TD,EDF->TEF", x_TD, up_EDF)), down_EFD)
    chosen_TkE = experts_Tk[..., None] == jnp.arange(E)
    return jnp.einsum("TED,TkE,Tk->TD", y_TED, chosen_TkE, weights_Tk)


def with_gradients(function, arguments, *rest):
    target = np.random.default_rng(1).normal(size=(T, D))
    value, back = jax.vjp(lambda *arguments: function(*arguments, *rest), *arguments)
    return [value, *back(jnp.asarray(target, value.dtype))]


@pytest.fixture(scope="module")
def reference():
    with jax.enable_x64(True):
        arguments, choices = operands("float64")
        return jax.device_get(jax.jit(lambda *each: with_gradients(dense, each, choices))(*arguments))


@pytest.mark.parametrize("block", [1, 8, 128])
def test_values_and_gradients_are_those_of_all_experts_in_float64(reference, block):
    """A block of 1 takes the path of TPUs."""
    arguments, choices = operands()
    with jax.set_mesh(mesh_of(1, 1, 1)):
        local = jax.shard_map(lambda *each: with_gradients(grouped, each, choices, block), out_specs=jax.P())
        found = jax.jit(local)(*arguments)
    for mine, right in zip(jax.device_get(found), reference, strict=True):
        assert np.linalg.norm(mine - right) < 2e-6 * np.linalg.norm(right)
    for gradient in found[2:4]:
        assert not np.any(gradient[np.array([1, 4])]) and np.all(np.any(gradient[np.array([0, 2, 3, 5])], (1, 2)))


@pytest.mark.parametrize("block", [1, 8, 128])
@pytest.mark.parametrize("choices", ["even", "one expert", "none of the first"])
def test_every_assignment_has_a_slot_of_its_expert(block, choices):
    draw = np.random.default_rng(2)
    experts_Tk = {
        "even": np.stack([draw.permutation(E)[:K] for _ in range(T)]),
        "one expert": np.stack([np.full(T, 3), draw.choice([0, 1, 2, 4, 5], T)], 1),
        "none of the first": np.stack([draw.permutation([3, 4, 5])[:K] for _ in range(T)]),
    }[choices]
    slots = jax.device_get(experts.make_slots(jnp.asarray(experts_Tk), E, block))
    assert slots.block == block
    taken = slots.slots_Tk.ravel()
    assert len(set(taken)) == T * K
    np.testing.assert_array_equal(slots.assignments_S[taken], np.arange(T * K))
    np.testing.assert_array_equal(slots.experts_n[taken // block], experts_Tk.ravel())
    assert (slots.assignments_S < T * K).sum() == T * K  # the other slots are empty
    assert slots.sizes_E.sum() <= len(slots.assignments_S) <= T * K + E * block
    np.testing.assert_array_equal(slots.sizes_E, -(-np.bincount(experts_Tk.ravel(), minlength=E) // block) * block)


def test_few_assignments_have_small_blocks():
    assert [experts.block_size(n, "cpu") for n in (1, 9, 70, 5000)] == [8, 8, 64, 128]
    assert experts.block_size(5000, "tpu") == 1 and experts.block_size(5000, "cuda") == 256
