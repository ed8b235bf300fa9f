"""``python -m densitylr train.py``: the doctor."""

import sys

from densitylr.doctor.cli import main

sys.exit(main())
