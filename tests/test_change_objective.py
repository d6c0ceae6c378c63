"""A new loss on preference pairs is one function and one row, shown in a copy of the package."""

from __future__ import annotations

import json

from test_change_requests import copied
