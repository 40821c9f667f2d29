# Sourced by demo.sh and run.sh: goes to the project's folder and makes .venv if there is none.
cd "$(dirname "$0")/.." || exit 1
if [ ! -x .venv/bin/python ]; then
    echo "Making .venv and installing requirements.txt: some minutes, once."
    ${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed (PyTorch's own need): set PYTHON=/path/to/python3.12" >&2; exit 1; }
    ${PYTHON:-python3} -m venv .venv || { rm -rf .venv; echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "${1:-requirements.txt}" || { echo "Packages could not be installed: is there a network? Run this again." >&2; exit 1; }
