"""The build backend of setuptools, with one addition: the types of the installed module.

Type checkers read no types from an installed module without a file py.typed, and a module that is a
single file cannot carry one (PEP 561). So the wheel has flowstore.py twice: as the module, and as
the stub package flowstore-stubs.
"""

import shutil
from pathlib import Path

from setuptools.build_meta import *  # noqa: F403
from setuptools.command import build_py


class BuildPy(build_py.build_py):
    """The command build_py, as pyproject.toml names it."""

    def run(self) -> None:
        """Copy the module, and once more as the stub. An editable install copies nothing."""
        super().run()
        if not self.editable_mode:
            stubs = Path(self.build_lib, "flowstore-stubs")
            stubs.mkdir(exist_ok=True)
            shutil.copyfile("flowstore.py", stubs / "__init__.pyi")

    def get_source_files(self) -> list[str]:
        """List the files of the source distribution. A wheel is built from it with this file."""
        return [*super().get_source_files(), ".ci/flowstore_build.py"]
