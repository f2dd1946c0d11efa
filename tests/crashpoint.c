/* Preloaded into a process: ends it before the k-th call that changes a directory, or lets the disk be full.

   crash_arm(root, kill_at, power_cut, full_after): from now on count calls on files below root; SIGKILL before
   call kill_at (0: never), with all that is not fsynced zeroed first if power_cut; ENOSPC after full_after bytes
   (-1: never). crash_count(): calls until now.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_DIRTY 512
static char root[PATH_MAX], dirty[MAX_DIRTY][PATH_MAX];
static long kill_at, calls, full_after = -1, written;
static int armed, power_cut, num_dirty;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void crash_arm(const char *directory, long at, int cut, long full) {
    strncpy(root, directory, PATH_MAX - 1);
    kill_at = at, power_cut = cut, full_after = full, calls = written = num_dirty = 0, armed = 1;
}
long crash_count(void) { return calls; }

static void zero_dirty(void) {
    static char zeros[1 << 16];
    for (int i = 0; i < num_dirty; i++) {
        struct stat st;
        int fd = syscall(SYS_openat, AT_FDCWD, dirty[i], O_WRONLY);
        if (fd < 0 || fstat(fd, &st)) continue;
        for (off_t at = 0; at < st.st_size; at += sizeof zeros) {
            size_t left = st.st_size - at;
            syscall(SYS_pwrite64, fd, zeros, left < sizeof zeros ? left : sizeof zeros, at);
        }
        syscall(SYS_close, fd);
    }
}
static void count(void) {
    pthread_mutex_lock(&lock);
    if (++calls == kill_at) {
        if (power_cut) zero_dirty();
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    pthread_mutex_unlock(&lock);
}
static int below(const char *path) { return armed && !strncmp(path, root, strlen(root)); }
static int of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = armed ? readlink(link, path, PATH_MAX - 1) : -1;
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}
static int of_at(int dirfd, const char *name, char *path) {
    if (!armed || name == NULL) return 0;
    if (name[0] == '/' || dirfd == AT_FDCWD) return snprintf(path, PATH_MAX, "%s", name), below(path);
    char folder[PATH_MAX];
    return of_fd(dirfd, folder) && snprintf(path, PATH_MAX, "%s/%s", folder, name) > 0;
}
static int find(const char *path) {
    for (int i = 0; i < num_dirty; i++)
        if (!strcmp(dirty[i], path)) return i;
    return -1;
}
static void soil(const char *path) {
    pthread_mutex_lock(&lock);
    if (find(path) < 0 && num_dirty < MAX_DIRTY) strcpy(dirty[num_dirty++], path);
    pthread_mutex_unlock(&lock);
}
static void clean(const char *path) {
    pthread_mutex_lock(&lock);
    int i = find(path);
    if (i >= 0) memmove(dirty[i], dirty[--num_dirty], PATH_MAX);
    pthread_mutex_unlock(&lock);
}
/* Bytes of a write that still have room; 0 sets ENOSPC. */
static size_t room(size_t size) {
    if (full_after < 0) return size;
    pthread_mutex_lock(&lock);
    long left = full_after - written;
    size_t fits = left <= 0 ? 0 : (size_t)left < size ? (size_t)left : size;
    written += fits;
    pthread_mutex_unlock(&lock);
    if (!fits && size) errno = ENOSPC;
    return fits;
}
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    if (of_fd(fd, path)) {
        count(), soil(path);
        size_t fits = room(size);
        if (!fits && size) return -1;
        size = fits;
    }
    return NEXT(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    char path[PATH_MAX];
    if (of_fd(fd, path)) {
        count(), soil(path);
        size_t fits = room(size);
        if (!fits && size) return -1;
        size = fits;
    }
    return NEXT(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return pwrite(fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *parts, int number) {
    char path[PATH_MAX];
    if (!of_fd(fd, path)) return NEXT(writev)(fd, parts, number);
    for (int i = 0; i < number; i++) /* a short write, as it may be: the caller goes on with the rest */
        if (parts[i].iov_len) return write(fd, parts[i].iov_base, parts[i].iov_len);
    return 0;
}
int fsync(int fd) {
    char path[PATH_MAX];
    if (!of_fd(fd, path)) return NEXT(fsync)(fd);
    count(), clean(path);
    return NEXT(fsync)(fd);
}
static int opening(int (*next)(const char *, int, ...), const char *path, int flags, int mode) {
    if ((flags & O_CREAT) && below(path)) count();
    return next(path, flags, mode);
}
int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    return opening(NEXT(open), path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    return opening(NEXT(open64), path, flags, mode);
}
int rename(const char *from, const char *to) {
    if (below(to)) {
        count();
        if (find(from) >= 0) clean(from), soil(to);
    }
    return NEXT(rename)(from, to);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    char source[PATH_MAX], target[PATH_MAX];
    if (of_at(from_dir, from, source) && of_at(to_dir, to, target)) {
        count();
        if (find(source) >= 0) clean(source), soil(target);
    }
    return NEXT(renameat)(from_dir, from, to_dir, to);
}
int ftruncate64(int fd, off_t size) {
    char path[PATH_MAX];
    if (of_fd(fd, path)) count(), soil(path);
    return NEXT(ftruncate64)(fd, size);
}
int unlink(const char *path) {
    if (below(path)) count(), clean(path);
    return NEXT(unlink)(path);
}
int unlinkat(int dirfd, const char *name, int flags) {
    char path[PATH_MAX];
    if (of_at(dirfd, name, path)) count(), clean(path);
    return NEXT(unlinkat)(dirfd, name, flags);
}
int rmdir(const char *path) {
    if (below(path)) count();
    return NEXT(rmdir)(path);
}
int mkdir(const char *path, mode_t mode) {
    if (below(path)) count();
    return NEXT(mkdir)(path, mode);
}
