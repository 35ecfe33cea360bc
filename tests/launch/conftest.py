"""Runs launch/tpu.sh against a stand-in for gcloud, which records its arguments, and answers or fails as a test asks."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

GCLOUD = LAUNCH.parent / "tests" / "fixtures" / "gcloud"


def put(path: Path, text: str) -> Path:
    """Writes a file that can be run, and returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Desk:
    """A machine that has the stand-in for gcloud on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / "record"
        path = f"{put(folder / 'bin' / 'gcloud', GCLOUD.read_text()).parent}:{os.environ['PATH']}"
        own = {"JAXBLOCK_TPU_NAME": "pod", "JAXBLOCK_TPU_ZONE": "us-east5-a", "GCLOUD_RECORD": str(self.record)}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAXBLOCK_")}
        self.environment = inherited | own | {"PATH": path, "TMPDIR": str(folder)}

    def tpu(self, *arguments: str, typed: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs launch/tpu.sh for the slice ``pod``."""
        command, variables = [LAUNCH / "tpu.sh", *arguments], self.environment | variables
        return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60, env=variables)

    @property
    def calls(self) -> list[list[str]]:
        """Returns the arguments of every call of gcloud so far, without ``compute tpus``, which each begins with."""
        words = self.record.read_text(encoding="utf-8").split("\0")[:-1] if self.record.exists() else []
        found = []
        while words:
            count, *words = words
            found.append(words[: int(count)])
            words = words[int(count) :]
        assert all(call[:2] == ["compute", "tpus"] for call in found)
        return [call[2:] for call in found]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)
