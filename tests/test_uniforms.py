"""The numbers drawn in lines are those of ``jax.random.uniform``, of which no line's length is slow to compile."""

import jax

from jaxblock.uniforms import uniform_arrays

SHAPES = [(3,), (2, 0, 3), (4, 3), (5, 2, 17), (1, 16), (1,)]


def test_arrays_drawn_together_are_those_drawn_alone():
    keys = jax.random.split(jax.random.key(7), len(SHAPES))
    arrays = uniform_arrays(keys, SHAPES)
    assert [array.shape for array in arrays] == SHAPES
    for key, array in zip(keys, arrays, strict=True):
        assert (array == jax.random.uniform(key, array.shape)).all()


def test_all_numbers_come_from_one_line_of_whole_vectors():
    keys = jax.random.split(jax.random.key(7), len(SHAPES))
    program = jax.make_jaxpr(lambda keys: uniform_arrays(keys, SHAPES))(keys)
    drawn = [eqn.outvars[0].aval.shape for eqn in program.eqns if eqn.params.get("name") == "_uniform"]
    assert drawn == [(len(SHAPES), 176)]  # 5 * 2 * 17 = 170 numbers, rounded up to a multiple of 16
