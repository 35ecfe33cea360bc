"""The numbers drawn in lines are those of ``jax.random.uniform``, of which no line's length is slow to compile."""

import jax

from jaxblock.uniforms import uniform_arrays


def test_arrays_drawn_together_are_those_drawn_alone_and_come_from_one_line_of_whole_vectors():
    shapes = [(3,), (2, 0, 3), (4, 3), (5, 2, 17), (1, 16), (1,)]
    keys = jax.random.split(jax.random.key(7), len(shapes))
    for key, shape, array in zip(keys, shapes, uniform_arrays(keys, shapes), strict=True):
        assert array.shape == shape and (array == jax.random.uniform(key, shape)).all()
    program = jax.make_jaxpr(lambda keys: uniform_arrays(keys, shapes))(keys)
    drawn = [eqn.outvars[0].aval.shape for eqn in program.eqns if eqn.params.get("name") == "_uniform"]
    assert drawn == [(len(shapes), 176)]  # 5 * 2 * 17 = 170 numbers, rounded up to a multiple of 16
