# Sourced by demo.sh, run.sh and .ci/run: goes to the project's folder, makes .venv if there is
# none, installs what the file given as $1 lists, and sets $python to .venv's.
cd "$(dirname "$0")/.." || exit 1
if [ ! -x .venv/bin/python ] && [ ! -x .venv/Scripts/python.exe ]; then
    echo "Making .venv and installing requirements.txt: some minutes, once."
    ${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "Python 3.10 or newer is needed (PyTorch's need): set PYTHON=/path/to/python3.12" >&2
        exit 1
    }
    ${PYTHON:-python3} -m venv .venv || {
        rm -rf .venv
        echo "No virtual environment could be made; on Debian, Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi
python=.venv/bin/python
[ -x "$python" ] || python=.venv/Scripts/python.exe # on Windows
"$python" -m pip install --quiet --disable-pip-version-check -r "${1:-requirements.txt}" || {
    echo "Packages could not be installed: is there a network? Run this again." >&2
    exit 1
}
