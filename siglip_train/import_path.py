"""Modules are never looked for in the working folder first, where a file html.py would replace Python's own."""

# nothing that is not loaded yet, as it would come from there
import os
import sys


def working_folder_last() -> None:
    """Put the working folder, which `python -m` puts first, behind Python's library and what is installed.

    Modules of one's own that a `_target_` names are found there still. Where it is the checkout that this file lies in,
    it stays before what is installed, which may hold another version of this project.
    """
    # so it is while the packages of a module that was named by `-m` are imported
    if sys.argv[:1] != ["-m"] or sys.flags.safe_path or sys.path[:1] != [os.getcwd()]:
        return
    folder = sys.path.pop(0)
    place = len(sys.path)
    if os.path.realpath(folder) == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
        installed = [
            i for i, path in enumerate(sys.path) if path.endswith(("site-packages", "dist-packages"))
        ]
        place = min(installed, default=place)
    sys.path.insert(place, folder)
