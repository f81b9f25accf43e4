#!/usr/bin/env bash
# Compiles MinkowskiEngine for the CPU and installs it into .venv; again only if it, torch or this script changed.
#
#   bash run/install_minkowski.sh
#
# Needs: Linux, a C++ compiler, Python's and OpenBLAS's headers. As root on Debian and Ubuntu it installs what is
#   missing with apt-get, elsewhere it says what to install. A GPU and nvcc are not used, even if there are some.
# Takes 3 to 5 minutes on 2 CPU cores and 2.3 GB of memory per core the first time, two seconds afterwards.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/run/setup.sh"
venv=$root/.venv
python=$venv/bin/python
requirements=$root/requirements-minkowski.txt
stamp=$venv/installed-minkowski # a checksum of what was installed and how, written last
log=$venv/install-minkowski.log

fail() {
    printf 'install_minkowski: %s\n' "$*" >&2
    exit 1
}

say() {
    printf 'install_minkowski: %s\n' "$*" >&2
}

# A checksum of everything the compiled code depends on: its extension fits one version of torch only.
identity() {
    {
        cat "$requirements" "$root/run/install_minkowski.sh"
        "$python" -c 'from importlib.metadata import version; print(version("torch"))'
    } | sha256sum
}

installed() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(identity)" ] &&
        "$python" -P -W ignore -c 'import MinkowskiEngine' 2>/dev/null
}

installed && exit 0

# compiles LINES OPTION ...: whether a C++ program of these lines compiles and links.
compiles() {
    local lines=$1
    shift
    printf '%b' "$lines" | "${CXX:-g++}" -x c++ -o /dev/null - "$@" 2>/dev/null
}

# The Debian packages of what is missing, one per line.
missing() {
    local headers
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$headers/Python.h" ] || printf 'python3-dev\n'
    compiles 'int main() {}\n' || printf 'g++\n' # and without it the next line has to take OpenBLAS for missing too
    compiles 'extern "C" {\n#include <cblas.h>\n}\nint main() { return cblas_dasum(0, 0, 1) > 0; }\n' -lopenblas ||
        printf 'libopenblas-dev\n'
}

mapfile -t lacking < <(missing)
if [ ${#lacking[@]} -gt 0 ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    say "installing with apt-get: ${lacking[*]}"
    (
        export DEBIAN_FRONTEND=noninteractive
        timeout 120 apt-get update -qq && timeout 600 apt-get install -y -qq --no-install-recommends "${lacking[@]}"
    ) >"$log" 2>&1 || tail -n 3 "$log" >&2
    mapfile -t lacking < <(missing)
    installed && exit 0 # what was compiled earlier lacked only that
fi
[ ${#lacking[@]} -eq 0 ] ||
    fail "cannot compile, something is missing; on Debian and Ubuntu: apt-get install ${lacking[*]}"

rm -f "$stamp"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir "$build/tmp" "$build/wheels"
export TMPDIR=$build/tmp

pip() {
    "$python" -m pip "$@" --disable-pip-version-check --no-input --progress-bar off
}

# logged WORDS COMMAND ...: run it, all that it prints goes to the log; if it fails, WORDS and the end of the log.
logged() {
    local words=$1
    shift
    if ! "$@" >>"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "$words; the whole output is in $log. Mend the cause and run this again"
    fi
}

: >"$log"
pinned=$(sed -n 's/^\(MinkowskiEngine==[^ ]*\).*/\1/p' "$requirements")
[ -n "$pinned" ] || fail "$requirements does not pin MinkowskiEngine"
say "fetching $pinned"
grep -v '^MinkowskiEngine' "$requirements" >"$build/tools.txt"
logged "pip did not install what compiles MinkowskiEngine" pip install -r "$build/tools.txt"

# pip fetches no source package without running its setup.py. That fails here, for want of torch in the environment
# that pip makes for it; the unpacked source is all that is wanted, and --no-clean leaves it.
PIP_NO_BUILD_ISOLATION='' pip download --no-deps --no-binary MinkowskiEngine --use-pep517 --no-clean \
    -d "$build/wheels" "$pinned" >>"$log" 2>&1 || true
source=$(find "$TMPDIR" -type d -name MinkowskiEngine | head -n 1)
[ -n "$source" ] || logged "pip did not fetch $pinned" false
source=$(dirname "$source")

# patch FILE SED_COMMAND: change the file, and fail if there was nothing to change.
patch() {
    cp "$source/$1" "$build/before"
    sed "$2" "$build/before" >"$source/$1"
    ! cmp -s "$source/$1" "$build/before" || fail "$1 of $pinned has no text for the patch $2"
}

# It is built through pip, which hands no options on: --cpu_only, also where torch sees a GPU.
patch setup.py 's/^CPU_ONLY, argv = _argparse("--cpu_only", argv)$/CPU_ONLY = True/'
# --blas=openblas; without it numpy.distutils is asked, which is gone or fails with the setuptools of today.
patch setup.py 's/^BLAS, argv = _argparse("--blas", argv, False)$/BLAS = "openblas"/'
# It would uninstall MinkowskiEngine with whichever pip is the first in PATH, of another environment perhaps.
patch setup.py '/^run_command("pip", "uninstall", /d'
# Sequence left collections for collections.abc with Python 3.10.
for file in MinkowskiCommon MinkowskiCoordinateManager MinkowskiTensorField utils/quantization; do
    patch "MinkowskiEngine/$file.py" 's/^from collections import Sequence$/from collections.abc import Sequence/'
done
sequence='from collections import namedtuple; from collections.abc import Sequence'
patch MinkowskiEngine/MinkowskiKernelGenerator.py "s/^from collections import Sequence, namedtuple$/$sequence/"
# A reference to a temporary map is returned where there are no coordinates, and reading it crashes; keep the empty map.
patch src/coordinate_map_manager.cpp \
    's/^ *return \(detail::empty_map_functor<coordinate_type, TemplatedAllocator,\)$/return m_kernel_maps[kernel_map_key] = \1/'

jobs=$(nproc)
say "compiling, 3 to 5 minutes with 2 jobs (here $jobs)"
# No symbols for a debugger: they would be 75 of 76 MB. The C++ standard is named by torch's BuildExtension.
MAX_JOBS=$jobs CFLAGS="${CFLAGS:-} -g0" PATH=$venv/bin:$PATH logged "MinkowskiEngine could not be compiled" \
    pip wheel --no-deps --no-build-isolation --use-pep517 -w "$build/wheels" "$source"
logged "pip did not install what was compiled" \
    pip install --no-deps --no-index --find-links "$build/wheels" --force-reinstall "$pinned"

# A 3x3 convolution over half of the sites of an image, forward and backward, against torch's over the whole image.
say "trying it"
cat >"$build/try.py" <<'END'
import torch
import MinkowskiEngine

torch.manual_seed(0)
sites = (torch.rand(2, 9, 7) < 0.5).nonzero().contiguous()  # rows of (image, y, x)
features = torch.randn(len(sites), 3, dtype=torch.float64, requires_grad=True)
layer = MinkowskiEngine.MinkowskiConvolution(3, 4, kernel_size=3, dimension=2).double()
assert layer.kernel.shape == (9, 3, 4), layer.kernel.shape
found = layer(MinkowskiEngine.SparseTensor(features, coordinates=sites.int()))
assert torch.equal(found.C, sites.int())

n, y, x = sites.T
image = torch.zeros(2, 9, 7, 3, dtype=torch.float64).index_put((n, y, x), features).permute(0, 3, 1, 2)
weight = layer.kernel.reshape(3, 3, 3, 4).permute(3, 2, 1, 0)  # (x, y, in, out): the first axis runs fastest
expected = torch.nn.functional.conv2d(image, weight, padding=1)[n, :, y, x]
torch.testing.assert_close(found.F, expected)
upstream = torch.randn_like(expected)
of = (features, layer.kernel)
torch.testing.assert_close(torch.autograd.grad(found.F, of, upstream), torch.autograd.grad(expected, of, upstream))
END
logged "MinkowskiEngine does not compute what torch does" "$python" -W ignore "$build/try.py"

identity >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done"
