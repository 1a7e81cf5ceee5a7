"""The form of a schedule: the parts that an order plans with, or a refusal by name."""

import functools
from typing import NamedTuple

from framepack_jax.packing.kernels import ScheduleError
from framepack_jax.packing.schedule import (
    RELEASED_F1,
    RELEASED_INVERTED,
    Context,
    Generate,
    Schedule,
    Skip,
    Tail,
)

NOTHING = Context(())
ENDPOINT = "td_f16k4f2k2f1k1_g9_x_f1k1"
FORMS = {
    "inverted": RELEASED_INVERTED,
    "forward": f"{RELEASED_F1} or td_f16k4f2k2f1k1_g9",
    "endpoint": ENDPOINT,
    "planned": f"{RELEASED_INVERTED} or {ENDPOINT}",
}


class Form(NamedTuple):
    """The parts of a schedule that can be sampled; a context that it lacks has no frames.

    `anchor` are the first frames of a video, or those before the section for sections made towards
    them; `history` lies next to the section, after it for a form made from the end (`backward`);
    `ending` are the first frames of what follows, beyond a gap.
    """

    window: int
    anchor: Context = NOTHING
    history: Context = NOTHING
    ending: Context = NOTHING
    backward: bool = False


@functools.lru_cache(maxsize=256)
def form_of(schedule: Schedule) -> Form:
    """Return the form of a schedule. Raises ScheduleError if it cannot be sampled in its order."""
    if not schedule.order:
        raise ScheduleError(f"schedule {schedule} generates nothing: it has no item g")
    name = schedule.order.partition("(")[0]
    if schedule.discretize is not None:
        raise ScheduleError(
            f"schedule {schedule}: history discretization (+D) is not supported yet"
        )
    for tail in schedule.items:
        if isinstance(tail, Tail) and tail.kind != "td":
            raise ScheduleError(f"schedule {schedule}: tail {tail} is not supported yet; use td")
    match name, schedule.items:
        case (
            "inverted" | "planned",
            (Context() as anchor, Skip(), Generate(w), Context() as history, Tail()),
        ):
            return Form(w, anchor, history, backward=True)
        case "forward", (Context() as anchor, Skip(), Context() as history, Generate(w)):
            return Form(w, anchor, history)
        case "forward", (Tail(), Context() as history, Generate(w)):
            return Form(w, history=history)
        case "forward", (Generate(w),):
            return Form(w)
        case (
            "endpoint" | "planned",
            (Tail(), Context() as history, Generate(w), Skip(), Context() as ending),
        ):
            return Form(w, history=history, ending=ending)
        case (
            "endpoint" | "planned",
            (
                Context() as anchor, Skip(), Context() as history,
                Generate(w), Skip(), Context() as ending,
            ),
        ):  # fmt: skip
            return Form(w, anchor, history, ending)
    raise ScheduleError(
        f"schedule {schedule} cannot be sampled in order {schedule.order!r}: expected the form of"
        f" {FORMS[name]}"
    )
