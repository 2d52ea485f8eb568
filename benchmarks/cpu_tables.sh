#!/usr/bin/env bash
# Every table and figure of the CPU kernels and of data loading, on two threads. Needs about half an hour without other work.
#
#     SWARD_DATA=/datasets bash benchmarks/cpu_tables.sh
#
# SWARD_DATA holds cvc_clinicdb, cvc_colondb and camvid. PYTHON names another interpreter than `python`. Results go to
# benchmarks/results/ and to the terminal. A benchmark that fails does not stop the others; the script then ends with 1.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${SWARD_DATA:?must name the folder of the data sets}"
export PYTHONPATH=$PWD
unset OMP_NUM_THREADS
failed=0
run() {
    echo "== $*"
    "${PYTHON:-python}" -W ignore "benchmarks/$@" || failed=1
}
run mwad_throughput.py
run mwad_throughput.py --sweep
run relational_kl_throughput.py
run pdr_throughput.py --sweep
run step_parts.py
run step_parts.py --preset clinicdb-unext --recipe paper
run training_step.py
run data_loading.py
exit "$failed"
