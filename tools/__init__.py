"""tools/ is called extras/ now. `python -m tools.NAME` says which command to use instead and ends
with status 2."""

import sys

SAME_NAME = ("convert", "engines", "oracle", "predictions", "rollouts", "serve")
COMMANDS = {name: f"python -m extras.{name}" for name in SAME_NAME}
COMMANDS["volumes"] = "python -m extras.scans"


def module_that_runs() -> str:
    """Returns what follows -m on Python's command line, "tools.serve" for example. "" where this
    package is imported by a program."""
    if sys.argv[0] != "-m":  # it is "-m" only until Python has found the module
        return ""
    for word in sys.orig_argv[1:]:
        name = word.removeprefix("-m")
        if name.partition(".")[0] == "tools":
            return name
    return ""


def where_it_is(module: str) -> str:
    """Returns one line that says where a module of tools/ is now."""
    name = module.partition(".")[2]
    if name in COMMANDS:
        return f"tools/ is extras/ now: use {COMMANDS[name]}"
    return "tools/ is extras/ now: use python -m extras.NAME"


RUNS = module_that_runs()
if RUNS:
    print("error:", where_it_is(RUNS), file=sys.stderr)
    sys.exit(2)
