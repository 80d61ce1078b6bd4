#!/usr/bin/env bash
# The evidence from a machine with a CUDA GPU, the most telling first: bench/gpu_check.py says how.
#
#     bench/gpu_check.sh [--minutes N] [--dry-run] [--archive FILE] OUT [stage...]
#
# No network, no installs: what the interpreter PYTHON (default: python3) has is used.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
