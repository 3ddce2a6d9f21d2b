"""python -m whisper_steer.cli"""

import sys

from . import main

sys.exit(main())
