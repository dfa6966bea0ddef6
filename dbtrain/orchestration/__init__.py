"""Who trains what where: a coordinator without Ray in it, and two backends, Ray actors and this process."""

import os

# Ray reads this when it is imported, by whichever module of this package comes first. Workers shall run in the driver's
# own environment, also under `uv run`; and that a worker died is told by the coordinator, not by a line on standard
# output.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "^(A worker died or was killed while executing|Raylet is terminated|The node with node id|A raylet|"
    "The autoscaler|Warning: The following resource request|There are tasks with infeasible|.*killed due to memory)",
)
