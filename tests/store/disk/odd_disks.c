/* File systems that lack something, for whatever is started with this library preloaded.
 *
 * ODD_FLOCK  an error number that flock() fails with, or "always": every lock is granted, or "nfs": as that of NFS,
 *            which locks the bytes of a file, so that an exclusive lock needs a file that is open for writing
 * ODD_LINK   an error number that link() and linkat() fail with
 * ODD_FSYNC  an error number that fsync() of a folder fails with
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

static int oddity(const char *name) {
    const char *value = getenv(name);
    return value == NULL ? 0 : atoi(value);
}

int flock(int file, int operation) {
    const char *value = getenv("ODD_FLOCK");
    if (value != NULL && strcmp(value, "always") == 0)
        return 0;
    if (value != NULL && strcmp(value, "nfs") == 0) {
        int mode = fcntl(file, F_GETFL) & O_ACCMODE;
        int useless = operation & LOCK_EX ? O_RDONLY : operation & LOCK_SH ? O_WRONLY : -1;
        if (mode == useless) {
            errno = EBADF;
            return -1;
        }
    } else if (oddity("ODD_FLOCK")) {
        errno = oddity("ODD_FLOCK");
        return -1;
    }
    int (*real)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    return real(file, operation);
}

int link(const char *from, const char *to) {
    if (oddity("ODD_LINK")) {
        errno = oddity("ODD_LINK");
        return -1;
    }
    int (*real)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "link");
    return real(from, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    if (oddity("ODD_LINK")) {
        errno = oddity("ODD_LINK");
        return -1;
    }
    int (*real)(int, const char *, int, const char *, int) =
        (int (*)(int, const char *, int, const char *, int))dlsym(RTLD_NEXT, "linkat");
    return real(from_folder, from, to_folder, to, flags);
}

int fsync(int file) {
    struct stat found;
    if (oddity("ODD_FSYNC") && fstat(file, &found) == 0 && S_ISDIR(found.st_mode)) {
        errno = oddity("ODD_FSYNC");
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return real(file);
}
