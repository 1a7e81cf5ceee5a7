"""Diffusion mathematics: flow matching, its noise levels, guidance and solvers. No networks.

Sampling is `state = solver.start(noise)`, then one `solver.step(state, x0, row)` for each row of
`solver_table(name, sigmas)`, where x0 is the network's prediction at `state.x`; at the end
`state.x` is the sample.
"""

from framepack_jax.diffusion.solver_tables import SOLVERS, solver_table

__all__ = ["SOLVERS", "solver_table"]
