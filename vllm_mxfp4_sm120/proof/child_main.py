# SPDX-License-Identifier: Apache-2.0
"""What child.py starts, by its path: one JSON task as argument, one JSON answer on stdout.

Only the standard library is imported before it knows where to find modules.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any


def load_package() -> None:
    """Make `vllm_mxfp4_sm120` the package that this file lies in, wherever else another one may be found."""
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location(
        root.name, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[root.name] = package
    spec.loader.exec_module(package)


def solve(task: dict[str, Any]) -> dict[str, Any]:
    """The task's outcome, as a dictionary of `Proof`."""
    module, _, name = task["solver"].partition(":")
    return asdict(getattr(importlib.import_module(module), name)(**task["arguments"]))


def main(task: dict[str, Any]) -> None:
    sys.path[:] = task["path"]
    # What libraries print goes to stderr: stdout is for the answer alone.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answer:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        load_package()
        answer.write(json.dumps(solve(task)))


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Exception:
        traceback.print_exc(limit=4)
        sys.exit(1)
