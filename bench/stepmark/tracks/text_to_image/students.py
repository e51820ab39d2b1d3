"""Students that several methods start from or are held against, each trained once for all of them (`session.once`)."""

from __future__ import annotations

from torch import Tensor

from stepmark.session import Session
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.consistency import Drawn, distil

UPDATES = 240  # of a plain consistency student: who asks for one gives this number, so that it is trained once
UPDATES_OF_BASE = 240  # the same of a student that has seen nothing of its task's style


def lcm_student(session: Session, updates: int) -> dict[str, Tensor]:
    """A plain latent consistency student of the UNet teacher, told the guidance scale (Luo et al. 2023): its weights.

    For `session.once(lcm_student, session.scale(UPDATES, 2))` in `prepare`. What `session.clone("teacher")` builds takes them,
    and `consistency.sample` draws with it.
    """
    student = session.clone("teacher")
    student.words.requires_grad_(False)
    distil(session, student, updates)
    return student.state_dict()


def student_of_base(session: Session, updates: int) -> dict[str, Tensor]:
    """As `lcm_student`, but of the network `base` and on pictures that it drew itself: a student to be tuned to another style.

    For `session.once(student_of_base, session.scale(UPDATES_OF_BASE, 2))`.
    """
    student = session.clone("base")
    student.words.requires_grad_(False)
    data = Drawn(session, "base", session.scale(400, 4), session.scale(8, 1), GUIDANCE)
    distil(session, student, updates, role="base", data=data)
    return student.state_dict()
