"""What a folder consists of, by which one that is damaged is known: the size and the SHA-256 of each file."""

import hashlib
import json
from pathlib import Path

from nextscale.base.errors import first_sentence
from nextscale.base.files import read_text, sync_file, write_text_aside

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`, once all other files of the folder are there, and have them on the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST_FILE:
            sync_file(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    content = {"format_version": FORMAT_VERSION, "files": files}
    write_text_aside(folder / MANIFEST_FILE, json.dumps(content, indent=2) + "\n")


def find_damage(folder: Path) -> str | None:
    """What of a folder is not as its manifest says, as the end of a sentence; None if it is whole."""
    try:
        content = json.loads(read_text(folder / MANIFEST_FILE))
        version = content["format_version"]
        entries = {str(name): (int(of["size"]), str(of["sha256"])) for name, of in content["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({first_sentence(error)})"
    if version != FORMAT_VERSION:
        return f"its {MANIFEST_FILE} has the version {str(version)[:20]}, expected {FORMAT_VERSION}"
    for name, (size, digest) in entries.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            return f"'{name[:80]}' is missing"
        if (found := path.stat().st_size) != size:
            return f"'{name}' has {found:,} bytes, expected {size:,}"
        if _sha256(path) != digest:
            return f"'{name}' is not what was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
