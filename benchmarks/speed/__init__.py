# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of speed share: what is compared, the clock, the machine's limits, and the report."""
