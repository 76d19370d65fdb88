# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_var`, where the command `hf-var` is not on the path."""

import sys

from .cli import main


sys.exit(main())
