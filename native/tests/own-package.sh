# own_package BUILD: a Python package of this tree with the libraries of a build, and the tests beside it, in BUILD/python. Those of
# `make dev` stay as they are.
own_package() {
    local package=$1/python/sfi_local
    rm -rf "$1/python"
    mkdir -p "$package"
    cp -rL sfi_local/*.py $(find sfi_local -mindepth 1 -maxdepth 1 -type d) models "$package"  # lib is a link
    cp "$1"/package/* "$package"
    ln -s "$1/bin" "$package/lib"
    cp -r tests pyproject.toml "$1/python"
}
