"""``python -m densitylr train.py``: the doctor."""

import sys

from densitylr.doctor import main

sys.exit(main())
