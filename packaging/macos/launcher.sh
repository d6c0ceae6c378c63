#!/bin/sh
# Starts the studio of mlx-lora and opens its page. make_app.py puts this file into MLX LoRA.app, which Finder starts without a terminal:
# what goes wrong is shown in a dialog, and all output is in the log.
set -u

name="MLX LoRA"
resources="$(cd "$(dirname "$0")/../Resources" && pwd)"
version="$(cat "$resources/version")"
support="$HOME/Library/Application Support/$name"
log="$HOME/Library/Logs/$name.log"
environment="$support/env"
address="http://127.0.0.1:8090"
# Finder gives only the system's folders.
PATH="$PATH:/opt/homebrew/bin:/usr/local/bin:$HOME/.local/bin"
for release in 3.14 3.13 3.12 3.11; do
    PATH="$PATH:/Library/Frameworks/Python.framework/Versions/$release/bin"
done
export PATH

# ask TEXT BUTTON [BUTTON]: a dialog; prints the button that was pressed, the last one by the Return key. The words are
# arguments, so that nothing in them is read as AppleScript.
ask() {
    osascript -e 'on run argv' \
        -e 'set names to items 2 thru -1 of argv' \
        -e 'return button returned of (display dialog (item 1 of argv) with title "MLX LoRA" buttons names default button (count of names))' \
        -e 'end run' "$@"
}

fail() {
    echo "Error: $1" >>"$log"
    [ "$(ask "$1" "Show the log" "OK")" = "Show the log" ] && open "$log"
    exit 1
}

answers() {
    curl --silent --fail --max-time 2 "$address/health" >/dev/null 2>&1
}

# Never the python3 of macOS, which may not be there: to ask for it opens the installer of Apple's developer tools.
find_python() {
    for candidate in python3.13 python3.12 python3.14 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
}

install() {
    python="$(find_python)"
    if [ -z "$python" ]; then
        pressed="$(ask "mlx-lora needs Python 3.11 or newer. Install it from python.org, and open $name again." "Open python.org" "OK")"
        [ "$pressed" = "Open python.org" ] && open "https://www.python.org/downloads/macos/"
        exit 1
    fi
    pressed="$(ask "Install mlx-lora $version for this user? It goes to $environment, and its packages come from PyPI (some hundred MB)." "Cancel" "Install")"
    [ "$pressed" = "Install" ] || exit 0
    osascript -e 'display notification "Installing. The page opens when it is done." with title "MLX LoRA"' >>"$log" 2>&1
    wanted="mlx-lora[serve]==$version"
    for wheel in "$resources"/*.whl; do
        [ -f "$wheel" ] && wanted="${wheel}[serve]"
    done
    rm -rf "$environment" # what an interrupted installation left, or another version
    "$python" -m venv "$environment" >>"$log" 2>&1 || fail "Python could not make an environment in $environment."
    "$environment/bin/python" -m pip install --disable-pip-version-check "$wanted" >>"$log" 2>&1 ||
        fail "mlx-lora could not be installed. Check the internet connection, and open $name again."
    echo "$version" >"$environment/installed"
}

mkdir -p "$support" "$(dirname "$log")" || exit 1
if answers; then # it runs already
    open "$address"
    exit 0
fi
echo "--- $(date), $name $version" >"$log"
[ "$(uname -m)" = "arm64" ] || fail "mlx-lora needs a Mac with Apple silicon."
[ "$(cat "$environment/installed" 2>/dev/null)" = "$version" ] || install

cd "$HOME" || exit 1
"$environment/bin/mlx-lora" studio --no-browser >>"$log" 2>&1 &
studio=$!
trap 'kill -TERM "$studio" 2>/dev/null; wait "$studio"' EXIT
trap 'exit 1' TERM INT
until answers; do
    kill -0 "$studio" 2>/dev/null || fail "The studio ended: $(tail -n 1 "$log")"
    sleep 0.5
done
open "$address"
while kill -0 "$studio" 2>/dev/null; do
    pressed="$(ask "The studio is open at $address. Runs continue when you stop it." "Stop the studio" "Open the page")" || break
    [ "$pressed" = "Open the page" ] || break
    open "$address"
done
