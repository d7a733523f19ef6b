"""`python -m graftwork.pipelines`: the command as a cluster runs it, with nothing installed."""

import os
import sys

if sys.path[:1] == [os.getcwd()] and not os.path.isdir(os.path.join(sys.path[0], "graftwork")):
    # Python puts it first for `-m`; a user's `torch/` or `queue.py` there would be taken for ours.
    del sys.path[0]

from graftwork.pipelines.cli import main

main()
