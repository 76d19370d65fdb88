# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_var.cli`, where the command is not on the path."""

import sys

from . import main


sys.exit(main())
