"""The share of a program's temporaries that the forward pass keeps for the backward pass."""

import jax
import jax.numpy as jnp
import pytest

from mmei_jax.profiling.liveness import forward_share
from mmei_jax.profiling.programs import describe_program
from mmei_jax.program_text import parse_program
from mmei_jax.train_step import step_compiler_options

# The forward pass makes 400 bytes that the backward pass reads, and 200 that it does not; the backward pass makes 100
# while both of its operands are alive. What is given back is no temporary.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[100]) -> f32[25] {
  %x = f32[100]{0} parameter(0)
  %kept = f32[100]{0} exponential(%x), metadata={op_name="jit(step)/jvp(M)/exp"}
  %dropped = f32[50]{0} slice(%kept), slice={[0:50]}, metadata={op_name="jit(step)/jvp(M)/slice"}
  %read = f32[5]{0} slice(%dropped), slice={[0:5]}, metadata={op_name="jit(step)/jvp(M)/slice"}
  %view = f32[10,10]{1,0} bitcast(%kept)
  %back = f32[25]{0} custom-call(%view), custom_call_target="f", metadata={op_name="jit(step)/transpose(jvp(M))/f"}
  %again = f32[25]{0} add(%back, %back), metadata={op_name="jit(step)/transpose(jvp(M))/add"}
  ROOT %out = f32[25]{0} add(%again, %again), metadata={op_name="jit(step)/add"}
}
"""


def test_share_is_that_of_the_peak():
    # At the peak `kept`, `dropped` and `read` are alive.
    assert forward_share(parse_program(PROGRAM)) == 400 / (400 + 200 + 20)


def test_program_without_a_gradient_keeps_nothing():
    text = PROGRAM.replace("jvp(M)", "M").replace("transpose(M)", "M")
    assert forward_share(parse_program(text)) == 0.0


@pytest.fixture(scope="module")
def facts():
    """Of a gradient through layers: all kept, or computed again."""
    size, num_rows, num_layers = 32, 4096, 6

    def layer(x, weight):
        return jnp.tanh(x @ weight)

    def loss(weights, x, function):
        for weight in weights:
            x = function(x, weight)
        return (x**2).mean()

    # Else the compiler merges what is computed again with what was computed.
    options = step_compiler_options(jax.devices()[0])
    weights, x = jnp.ones((num_layers, size, size)), jnp.ones((num_rows, size))
    kept, again = (
        describe_program(
            jax.jit(jax.grad(loss), static_argnums=2, compiler_options=options).lower(weights, x, function).compile()
        )
        for function in (layer, jax.checkpoint(lambda x, weight: jnp.tanh(layer(layer(x, weight), weight))))
    )
    return kept, again, 4 * num_rows * size, num_layers


def test_activations_are_the_results_of_the_layers(facts):
    kept, _, layer_bytes, num_layers = facts
    assert (num_layers - 1) * layer_bytes <= kept.memory.activations <= (num_layers + 1) * layer_bytes
    assert kept.memory.workspace < 3 * layer_bytes


def test_what_is_computed_again_is_no_activation(facts):
    """Three products and curves a layer, of which one result is kept."""
    _, again, layer_bytes, num_layers = facts
    assert again.memory.activations <= (num_layers + 1) * layer_bytes
