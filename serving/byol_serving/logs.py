"""How the server's log looks: lines for people, or one JSON object a line for machines."""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

from byol_serving.rpc.calls import Call

slow_log = logging.getLogger("byol.slow")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and whatever `extra` was given."""

    def __init__(self, process: int | None = None) -> None:
        """`process` is this one's number, where several of a server write to the same log."""
        super().__init__()
        self._process = {} if process is None else {"process": process}

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; a traceback is one string under `exception`."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
        }
        fields |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def configure(form: str, level: str, *, calls: bool, process: int | None = None) -> None:
    """Sends the log to stderr.

    Args:
        form: text or json.
        level: debug, info, warning or error.
        calls: also a line for every call.
        process: its number, where several of a server write to the same log; each line has it.
    """
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        which = "" if process is None else f" [{process}]"
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s{which} %(levelname)s %(name)s %(message)s")
        )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("byol.rpc").setLevel(logging.NOTSET if calls else logging.WARNING)
    # It tells, build by build, which of its variants this processor cannot run.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)


def say_settings(settings: Mapping[str, tuple[object, str]]) -> None:
    """One line with every setting and where it came from, where that is not its default."""
    words = [
        f"{name}={value}" + (f" ({origin})" if origin != "default" else "")
        for name, (value, origin) in settings.items()
    ]
    values = {name: value for name, (value, _) in settings.items()}
    logging.getLogger("byol.server").info(
        "settings: %s", ", ".join(words), extra={"settings": values}
    )


class SlowLog:
    """Warns of each call that took longer than a limit, with where its time went."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is the limit. Streams count too: give it what is slow for them."""
        self._seconds = seconds

    def call_ended(self, call: Call) -> None:
        """For `Calls`."""
        took = call.ended - call.began
        if took < self._seconds:
            return
        steps = [
            {
                "step": step.name,
                "items": step.items,
                "wait_ms": round((step.began - step.queued) * 1000, 2),
                "work_ms": round((step.ended - step.began) * 1000, 2),
            }
            for step in call.steps[:16]
        ]
        slow_log.warning(
            "slow method=%s code=%s ms=%.2f request_id=%s steps=%s",
            call.method,
            call.code,
            took * 1000,
            call.request_id,
            json.dumps(steps),
            extra={
                "method": call.method,
                "code": call.code,
                "ms": took * 1000,
                "request_id": call.request_id,
                "steps": steps,
            },
        )
