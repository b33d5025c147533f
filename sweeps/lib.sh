# What the questions share: train a few seeds of each arm, tagged, then compare them in one table.
# OUTPUTS, SEEDS and PYTHON in the environment replace outputs, 0,1,2 and .venv/bin/python.
set -e
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python} outputs=${OUTPUTS:-outputs}
name=$(basename "$0" .sh)

train() { # one arm: words of train.py
  "$python" train.py -m "outputs=$outputs" "seed=${SEEDS:-0,1,2}" "tag=$name" "$@"
}

compare() { # the arms: conditions of `report compare`
  "$python" -m fourstage report compare "outputs=$outputs" "tag=$name" "$@"
}
