"""Threads of encoders are scheduled like all others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

OPEN = """
import os
from pathlib import Path
import av
from pdd_cli.system import without_real_time_scheduling

stream = av.open(os.devnull, "w", format="matroska").add_stream("libsvtav1", rate=25, options={"preset": "12"})
stream.width = stream.height = 64
stream.pix_fmt = "yuv420p10le"
with without_real_time_scheduling():
    stream.codec_context.open()
stream.encode(av.VideoFrame(64, 64, "yuv420p10le"))
print(sorted({os.sched_getscheduler(int(task.name)) for task in Path("/proc/self/task").iterdir()}))
print(len(list(Path("/proc/self/task").iterdir())))
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root on Linux gets it")
def test_an_encoder_does_not_make_threads_real_time() -> None:
    command = ["nice", sys.executable, "-c", OPEN]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "SVT_LOG": "1"})
    policies, count = result.stdout.splitlines()
    assert policies == str([os.SCHED_OTHER])
    assert int(count) > 5  # those of the encoder are among them
