"""Results as they come: rows of a CSV file that a killed run goes on from, and beside it what they were made with."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import PartialState

from freqkv.version import __version__

__all__ = ["Records", "environment", "text_digest"]


def text_digest(text: str) -> str:
    """The SHA-256 of a text in UTF-8, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def environment(repository: Path | None = None) -> dict[str, str]:
    """Versions and hardware that a result was made with.

    Parameters
    ----------
    repository : Path, optional
        A folder in a git checkout, whose commit is told as well.

    Returns
    -------
    dict of str to str
    """
    told = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "freqkv": __version__,
        "hardware": _hardware(),
        "threads": str(torch.get_num_threads()),
    }
    if repository is not None:
        command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            told["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            told["commit"] = "unknown"
    return told


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else f"{platform.machine()} CPU"


class Records:
    """A table that is written row by row, and read again by a run that goes on.

    The rows stand in `path`, a CSV file. Beside it a JSON file of the same name holds the settings, which must be the same
    when a run goes on, and the versions and hardware of each run. With several processes (`accelerate launch`) each writes rows
    of its own, beside `path`; :meth:`finish` joins them.

    Parameters
    ----------
    path : Path
        Its folder is made if it is not there.
    keys : sequence of str
        The columns that tell one row from another.
    values : sequence of str
        The other columns.
    settings : mapping
        All that figures depend on and that is in no column: model, texts and their digests, seeds. Values that JSON can hold.
    repository : Path, optional
        See :func:`environment`.
    state : accelerate.PartialState, optional
        The processes of this run; found out by default.

    Raises
    ------
    ValueError
        If `path` holds rows of other columns or other settings.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[str],
        values: Sequence[str],
        settings: Mapping[str, Any],
        repository: Path | None = None,
        state: PartialState | None = None,
    ) -> None:
        self.path, self.keys, self.columns = path, tuple(keys), (*keys, *values)
        # Without accelerators, accelerate tells processes from each other only where it is told that they are on CPUs.
        self._state = PartialState(cpu=not torch.accelerator.is_available()) if state is None else state
        self._about, self._now = path.with_suffix(".json"), environment(repository)
        self.settings = json.loads(json.dumps(dict(settings)))
        if self._state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._begin()
        self._state.wait_for_everyone()
        self._own = path if self._state.is_main_process else self._part(self._state.process_index)
        self._rows = {self._key(row): row for row in self._read(path)}

    def _begin(self) -> None:
        about: dict[str, Any] = {"settings": self.settings, "runs": []}
        if self._about.exists():
            about = json.loads(self._about.read_text(encoding="utf-8"))
            if about["settings"] != self.settings:
                names = sorted({*about["settings"], *self.settings})
                other = [n for n in names if about["settings"].get(n, ...) != self.settings.get(n, ...)]
                raise ValueError(
                    f"{self.path} was made with other settings ({', '.join(other)}): take them again, or write to another "
                    "folder, or delete the file and the JSON file beside it"
                )
        elif self.path.exists():
            raise ValueError(f"{self.path} has no {self._about.name} beside it: write to another folder, or delete it")
        # A run that was killed leaves rows of all its processes, the last of which may be cut.
        rows = [*self._read(self.path), *(row for part in self._parts() for row in self._read(part))]
        self._write(rows)
        for part in self._parts():
            part.unlink()
        _replace(self._about, json.dumps(about, indent=1) + "\n")

    def _note_run(self) -> None:
        """Tell with what the rows of this run were made, once there are some."""
        about = json.loads(self._about.read_text(encoding="utf-8"))
        if self._now not in about["runs"]:
            about["runs"].append(self._now)
            _replace(self._about, json.dumps(about, indent=1) + "\n")

    def _part(self, process: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{process}.part")

    def _parts(self) -> list[Path]:
        own = re.compile(re.escape(self.path.name) + r"\.\d+\.part")
        return sorted(file for file in self.path.parent.iterdir() if own.fullmatch(file.name))

    def _read(self, path: Path) -> list[dict[str, str]]:
        if not path.exists():
            return []
        data = path.read_bytes()
        text = data[: _end_of_rows(data)].decode()  # a run that was killed may leave a row that is cut
        limit = csv.field_size_limit(len(text) + 1)
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""))
            rows = list(reader)
        finally:
            csv.field_size_limit(limit)
        if text and tuple(reader.fieldnames or ()) != self.columns:
            raise ValueError(f"{path} has other columns than {', '.join(self.columns)}: write to another folder")
        return rows

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        unique = {self._key(row): row for row in rows}
        lines = [",".join(self.columns) + "\n", *(self._line(row) for row in unique.values())]
        _replace(self.path, "".join(lines))

    def _line(self, row: Mapping[str, Any]) -> str:
        def field(value: Any) -> str:
            text = str(value)
            return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text

        return ",".join(field(row[name]) for name in self.columns) + "\n"

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.keys)

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        """Whether the row of these keys is there; a mapping with more columns will do."""
        return self._key(key) in self._rows

    @property
    def is_main(self) -> bool:
        """Whether this is the process that draws tables and figures."""
        return bool(self._state.is_main_process)

    def share(self, units: Sequence[Any]) -> list[Any]:
        """The units of work of this process: every n-th, where there are n processes."""
        return list(units[self._state.process_index :: self._state.num_processes])

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows at once; a row of the same keys as one before is the one that counts.

        Raises
        ------
        ValueError
            If a row's columns are not those of the table.
        """
        made = list(rows)
        for row in made:
            if set(row) != set(self.columns):
                raise ValueError(f"a row has the columns {', '.join(self.columns)}, got {', '.join(row)}")
        if self.is_main:
            self._note_run()
        fresh = not self._own.exists()
        with self._own.open("a", encoding="utf-8", newline="") as file:
            file.write((",".join(self.columns) + "\n" if fresh else "") + "".join(self._line(row) for row in made))
        self._rows.update({self._key(row): {name: str(row[name]) for name in self.columns} for row in made})

    def finish(self) -> list[dict[str, str]]:
        """Wait for all processes, join their rows in one file, sorted by keys, and return them.

        Returns
        -------
        list of dict of str to str
            All rows; values as they stand in the file.
        """
        self._state.wait_for_everyone()
        if self._state.is_main_process:
            rows = [*self._read(self.path), *(row for part in self._parts() for row in self._read(part))]
            self._write(sorted(rows, key=lambda row: [_sortable(row[name]) for name in self.keys]))
            for part in self._parts():
                part.unlink()
        self._state.wait_for_everyone()
        rows = self._read(self.path)
        self._rows = {self._key(row): row for row in rows}
        return rows


def _end_of_rows(data: bytes) -> int:
    """Where the last whole row of a CSV file ends: behind a line break that is not inside quotes."""
    outside = 0
    for line in re.finditer(rb"[^\n]*\n", data):
        if data.count(b'"', outside, line.end()) % 2 == 0:
            outside = line.end()
    return outside


def _sortable(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), ""
    except ValueError:
        return 1, 0.0, text


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    partial = path.with_name(path.name + ".new")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)
