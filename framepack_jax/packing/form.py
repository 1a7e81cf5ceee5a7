"""The form of a schedule: the parts that an order plans with, or a refusal by name."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from framepack_jax.packing.kernels import ScheduleError
from framepack_jax.packing.schedule import (
    RELEASED_F1,
    RELEASED_INVERTED,
    Context,
    Generate,
    Item,
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
    `ending` are the first frames of what follows, beyond a gap. `tail` names the group of all
    frames beyond the history, see `kernels.tail_of`.
    """

    window: int
    anchor: Context = NOTHING
    history: Context = NOTHING
    ending: Context = NOTHING
    backward: bool = False
    tail: str = ""


@functools.lru_cache(maxsize=256)
def form_of(schedule: Schedule) -> Form:
    """Return the form of a schedule. Raises ScheduleError if it cannot be sampled in its order."""
    if not schedule.order:
        raise ScheduleError(f"schedule {schedule} generates nothing: it has no item g")
    name = schedule.order.partition("(")[0]
    tails = [item.kind for item in schedule.items if isinstance(item, Tail)]
    # Without a tail, older frames are left out as with td.
    items = [item for item in schedule.items if not isinstance(item, Tail)]
    form = _form(name, items)
    if form is None or len(tails) > 1 or not _tail_is_far(schedule, form):
        raise ScheduleError(
            f"schedule {schedule} cannot be sampled in order {schedule.order!r}: expected the form"
            f" of {FORMS[name]}"
        )
    return form._replace(tail=schedule.tail)


def _form(order: str, items: Sequence[Item]) -> Form | None:
    """Return the form of the items of a schedule, its tail left out; None if it has none."""
    match order, items:
        case "inverted" | "planned", [Context() as anchor, Skip(), Generate(w), Context() as h]:
            return Form(w, anchor, h, backward=True)
        case "forward", [Context() as anchor, Skip(), Context() as history, Generate(w)]:
            return Form(w, anchor, history)
        case "forward", [Context() as history, Generate(w)]:
            return Form(w, history=history)
        case "forward", [Generate(w)]:
            return Form(w)
        case "endpoint" | "planned", [Context() as h, Generate(w), Skip(), Context() as ending]:
            return Form(w, history=h, ending=ending)
        case (
            "endpoint" | "planned",
            [Context() as anchor, Skip(), Context() as h, Generate(w), Skip(), Context() as ending],
        ):
            return Form(w, anchor, h, ending)
    return None


def _tail_is_far(schedule: Schedule, form: Form) -> bool:
    """Return True if the tail lies at the far end of the history. It may be left out, except beside
    a history that has no anchor, where the paper writes it."""
    places = [i for i, item in enumerate(schedule.items) if isinstance(item, Tail)]
    if form.backward:
        return places == [len(schedule.items) - 1]
    if form.anchor.frames:
        return places in ([], [2])
    return places == ([0] if form.history.frames else [])
