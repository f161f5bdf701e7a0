# own_package BUILD ARGUMENTS...: build native/ in a folder, with arguments for CMake, and make a Python package of this tree with these
# libraries, and the tests beside it, in BUILD/python. What `make dev` built stays as it is. PYTHON, JOBS.
own_package() {
    local build=$1 package=$1/python/sfi_local python
    python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
    shift
    mkdir -p "$(dirname "$build")"
    cmake -S native -B "$build" -DPython_EXECUTABLE="$python" "$@" > "$build.log" 2>&1 || { tail -n 20 "$build.log"; exit 1; }
    nice cmake --build "$build" --parallel "${JOBS:-2}" >> "$build.log" 2>&1 || { tail -n 20 "$build.log"; exit 1; }
    rm -rf "$build/python"
    mkdir -p "$package"
    cp -rL sfi_local/*.py $(find sfi_local -mindepth 1 -maxdepth 1 -type d) models "$package"  # lib is a link
    cp "$build"/package/* "$package"
    ln -s "$build/bin" "$package/lib"
    cp -r tests pyproject.toml "$build/python"
}
