"""What a chat is told of the run, now and then and at its end."""

from __future__ import annotations

import traceback

from swanlab_ray.actors.journal.records import Notified
from swanlab_ray.actors.log import log
from swanlab_ray.actors.notify.messages import Notifications
from swanlab_ray.actors.notify.outbox import open_mailbox
from swanlab_ray.actors.writer.parts import Parts
from swanlab_ray.actors.writer.report import Report

LARK_DEADLINE_S = 5.0
"""How long the end waits for notifications that are on their way; ranks wait 90 s for all of the end."""


class Telling:
    """Passes on what is known to those who decide what of it is told.

    Args:
        parts: of the writer.
        report: says what is known.
    """

    def __init__(self, parts: Parts, report: Report) -> None:
        self._parts = parts
        self._report = report
        mailbox = open_mailbox(parts.settings, parts.notices, lambda key: parts.journal.append(Notified(key=key)))
        found = parts.recovered
        if found.sessions.over is not None:
            self.notifications = Notifications(mailbox, parts.notices, began=parts.clock.now(), again=True)
        else:
            began, again = found.began_ns / 1e9 or None, found.jobs > 1
            self.notifications = Notifications(mailbox, parts.notices, found.notified, found.alerts, began, again)

    def look(self) -> None:
        """See what is new."""
        status, now = self._report.status(), self._parts.clock.now()
        for fired in self._parts.reducer.fired():
            self.notifications.fire(fired, status, now)
        self.notifications.look(status, now)

    def end(self) -> None:
        """The run has ended. Whatever fails here, the actor must end all the same."""
        try:
            self.look()
            left = self.notifications.end(self._report.status(), self._parts.clock.now(), LARK_DEADLINE_S)
        except Exception:
            log(traceback.format_exc())
        else:
            if left:
                self._parts.notices(f"Lark did not take {left} notifications within {LARK_DEADLINE_S:.0f} s.")
