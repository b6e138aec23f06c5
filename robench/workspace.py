"""Where things are: the model registries, the reports, the data root. Nothing is created by asking.

A workspace is a folder with `model_zoo/` and `reports/` in it: by default the current folder, else `--workspace` or
`ROBENCH_WORKSPACE`. What is made is written there and nowhere else. Models are looked up in three registries, in this
order: the workspace's, the user's own, and the one that is shipped with the package.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from robench.errors import UserError

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Workspace:
    """The folders of one working place."""

    root: Path
    data_root: Path
    user_zoo: Path

    @classmethod
    def locate(cls, workspace: Path | None = None, data_root: Path | None = None) -> Workspace:
        """Use the arguments where given, else `ROBENCH_WORKSPACE` and `ROBENCH_DATA`, else the per-user defaults.

        Raises UserError for a workspace that is a file; one that is not there yet is made when something is written.
        """
        root = workspace or Path(os.environ.get("ROBENCH_WORKSPACE") or ".")
        if root.expanduser().is_file():
            raise UserError(f"the workspace {root} is a file; name a folder by --workspace or ROBENCH_WORKSPACE")
        personal = Path(platformdirs.user_data_dir("robench"))
        data = data_root or Path(os.environ.get("ROBENCH_DATA") or personal / "data")
        return cls(root=root.expanduser(), data_root=data.expanduser(), user_zoo=personal / "model_zoo")

    @property
    def model_zoo(self) -> Path:
        """Return the folder that new models are written to."""
        return self.root / "model_zoo"

    @property
    def registries(self) -> tuple[Path, ...]:
        """Return the folders models are looked up in, first match wins."""
        shipped = [PACKAGE / "bundled_zoo", PACKAGE.parent / "model_zoo"]
        return tuple(dict.fromkeys(p.absolute() for p in [self.root / "model_zoo", self.user_zoo, *shipped]))

    @property
    def reports(self) -> Path:
        """Return the folder of records, outcomes and leaderboards."""
        return self.root / "reports"
