"""The first thing that runs in mosaic-queue.pyz: looks at the host, unpacks once, starts.

It stands in front of shiv's bootstrap, which would unpack on any host, for anybody to read, and
for ever.  Every Python has to understand this file in order to be refused by it, so the syntax is
that of 2.7.  A tree is the unpacked site of one build for one Python: <root>/<build>-<Python>.
While a process lives it holds a shared lock on its tree; the time of last change says when the
tree was last used, to the day.
"""

import os
import sys

PLATFORM = "@PLATFORM@"  # these three are put in by pack.py
LIBC = "@LIBC@"  # the oldest
NEEDS = "@NEEDS@"  # both in words
VERSIONS = ((3, 11), (3, 12), (3, 13), (3, 14))
DAY = 24 * 3600
ARCHIVE = os.path.dirname(os.path.abspath(__file__))


def host():
    """This Python: what it is, its version, its ABI's flags, its platform, its C library."""
    name = getattr(getattr(sys, "implementation", None), "name", "cpython")
    uname = os.uname() if hasattr(os, "uname") else (sys.platform, "", "", "", "?")
    platform = uname[0].lower().replace("darwin", "macos") + "-" + uname[4]
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):
        libc = "darwin " + uname[2] if uname[0] == "Darwin" else "musl 0"
    bits = "" if sys.maxsize > 2**32 else "-32-bit"
    return name, sys.version_info[:3], getattr(sys, "abiflags", ""), platform + bits, libc


def refusal(name, version, flags, platform, libc):
    """Why the native modules in here cannot be loaded by such a Python; None when they can."""
    kind, least = LIBC.split()
    had, number = libc.split()[:2]
    new = [int(n) for n in number.split(".")[:2]] >= [int(n) for n in least.split(".")]
    right = name == "cpython" and version[:2] in VERSIONS and not flags and platform == PLATFORM
    if right and had == kind and new:
        return None
    found = name.replace("cpython", "CPython"), ".".join(map(str, version)) + flags, platform
    return (
        "mosaic-queue.pyz runs on CPython 3.11, 3.12, 3.13 and 3.14 for %s; " % NEEDS
        + "%s is %s %s for %s" % ((sys.executable or "this",) + found)
        + (" with %s" % libc if right else "")
    )


def end(sentence):
    if sys.stderr:
        sys.stderr.write(sentence + "\n")
    sys.exit(2)


def roots():
    """The folders that may hold trees, best first."""
    named = os.environ.get("SHIV_ROOT")
    if named:
        return [os.path.join(os.path.abspath(os.path.expanduser(named)), "mosaic-queue")]
    home = os.path.join(os.path.expanduser("~"), ".shiv", "mosaic-queue")
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME", ""), "mosaic-queue")
    temporary = [os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp"]
    mine = [os.path.join(folder, "mosaic-queue-%d" % os.geteuid()) for folder in temporary]
    return [root for root in [home, cache] + mine if os.path.isabs(root)]


def make_private(root):
    """Make the folder; one that somebody else could have filled is no place to run code from."""
    if not os.path.lexists(root):
        os.makedirs(os.path.dirname(root), 0o700, exist_ok=True)
        try:
            os.mkdir(root, 0o700)
        except FileExistsError:  # another first run was faster
            pass
    status = os.lstat(root)
    if status.st_mode & 0o170077 != 0o040000 or status.st_uid != os.geteuid():
        raise OSError("is not a folder of this user's alone")


def hold(tree):
    """Keep the tree from being cleaned up while this process lives: its status, or None."""
    import fcntl

    try:
        folder = os.open(tree, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(folder, fcntl.LOCK_SH)
    except OSError:
        pass  # a file system without locks: nobody gets the one to clean up either
    fcntl.fcntl(folder, fcntl.F_DUPFD_CLOEXEC, 10)  # 0, 1 and 2 may be closed, and stay so
    status = os.fstat(folder)
    os.close(folder)
    try:
        return status if os.path.samestat(status, os.stat(tree)) else None
    except FileNotFoundError:  # cleaned up between open and lock
        return None


def unpack(tree):
    """Unpack what this Python needs, under the root's lock, and compile it."""
    import contextlib
    import fcntl
    import pathlib
    import shutil
    import zipfile

    from _bootstrap import extract_site_packages

    class Site(zipfile.ZipFile):
        def infolist(self):
            own = ".cpython-%d%d-" % sys.version_info[:2]
            names = self.namelist()
            return [self.getinfo(name) for name in names if ".cpython-" not in name or own in name]

    root, name = os.path.split(tree)
    with open(os.path.join(root, "lock"), "w") as lock, Site(ARCHIVE) as site:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(tree + ".tmp", ignore_errors=True)  # of a run that was killed
        try:
            # Unpacks beside the tree and renames, unless another run has done so meanwhile.
            extract_site_packages(site, pathlib.Path(tree), compile_pyc=True, compile_workers=1)
        finally:
            shutil.rmtree(tree + ".tmp", ignore_errors=True)
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(root, ".%s_lock" % name))


def clean(tree):
    """Remove trees that nobody used for 30 days and nobody uses now, and what was left behind."""
    import fcntl
    import re
    import shutil
    import time

    root, own = os.path.split(tree)
    with open(os.path.join(root, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # somebody unpacks or cleans
        for name in sorted(os.listdir(root))[:100]:
            match = re.match(r"([0-9a-f]{16}-cpython-3[0-9]+)(\.tmp|\.old)?$", name)
            if not match or match.group(1) == own:
                continue
            path = os.path.join(root, name)
            left = match.group(2)
            try:
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    if not left and time.time() - os.fstat(folder).st_mtime > 30 * DAY:
                        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        left = ".old"
                        os.rename(path, path + left)  # who opens it next unpacks again
                        path += left
                finally:
                    os.close(folder)
            except OSError:
                continue  # in use, or no folder
            if left:
                shutil.rmtree(path, ignore_errors=True)


def start():
    """Find or make the tree, and run the program in it."""
    import json
    import time

    build = json.loads(__loader__.get_data("environment.json"))["build_id"]
    reasons = []
    for root in roots():
        tree = os.path.join(root, "%s-%s" % (build[:16], sys.implementation.cache_tag))
        try:
            make_private(root)
            status = hold(tree)
            if status is None:
                unpack(tree)
                clean(tree)
                status = hold(tree)
            used = status.st_mtime
            break
        except Exception as error:  # no space, no rights, a file that was cut: the next may do
            reasons.append("%s: %s" % (root, getattr(error, "strerror", None) or error))
    else:
        end("mosaic-queue.pyz cannot be unpacked to %s" % ", nor to ".join(reasons))
    if time.time() - used > DAY:
        try:
            os.utime(tree)
        except OSError:
            pass  # a tree that can only be read
        else:
            clean(tree)

    # Packages of the host stay out: theirs are other versions, and their plugins none of ours.
    others = [p for p in sys.path[1:] if not p.endswith(("site-packages", "dist-packages"))]
    sys.path[:] = [os.path.join(tree, "site-packages")] + others
    from mosaic_queue import main

    sys.exit(main())


if __name__ == "__main__":
    sentence = refusal(*host())
    if sentence:
        end(sentence)
    start()
