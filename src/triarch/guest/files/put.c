/* Writing: whatever is made appears under its name at once and whole, or not at all. */
#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/xattr.h>
#include <unistd.h>

#define PARTIAL_BYTES 64

/* The file that is being written. While `open` without a `file`, what comes is thrown away: it has failed already. */
static struct {
    bool open, resumable;
    int file, parent;
    char partial[PARTIAL_BYTES], path[PATH_MAX], name[NAME_MAX + 1];
    struct files_entry entry;
    uint8_t xattrs[FILES_MAX_FRAME_BYTES];
} put = {.file = -1, .parent = -1};

static void let_go(void) {
    if (put.file >= 0)
        close(put.file);
    if (put.parent >= 0)
        close(put.parent);
    put.file = put.parent = -1;
}

/* Tell why, leave nothing. */
static void fail(int number) {
    if (put.file >= 0)
        unlinkat(put.parent, put.partial, 0);
    let_go();
    wire_error(number, put.path);
}

void put_abandon(void) {
    if (put.file >= 0 && !put.resumable)
        unlinkat(put.parent, put.partial, 0);
    let_go();
}

static void name_partial(uint64_t tag) {
    if (!tag)
        getrandom(&tag, sizeof tag, 0);
    snprintf(put.partial, sizeof put.partial, FILES_PARTIAL_NAME, (unsigned long long)tag);
}

/* Open the directory that `path` is to be in; its links are followed as everybody's in this machine. */
static int open_place(const char *path) {
    size_t size = strlen(path);
    memcpy(put.path, path, size + 1);
    char room[PATH_MAX];
    memcpy(room, path, size + 1);
    while (size > 1 && room[size - 1] == '/')
        room[--size] = 0;
    char *slash = strrchr(room, '/');
    if (!slash[1] || !strcmp(slash + 1, ".") || !strcmp(slash + 1, ".."))
        return (errno = EISDIR), -1;
    if (strlen(slash + 1) > NAME_MAX)
        return (errno = ENAMETOOLONG), -1;
    strcpy(put.name, slash + 1);
    *slash = 0;
    return open(*room ? room : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
}

/* In this order: a change of owner takes set-user-ID bits and capabilities away (chown(2)). */
static int dress(int fd, const struct files_entry *entry) {
    struct files_frame frame = {.at = entry->xattrs, .end = entry->xattrs + entry->xattrs_size};
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = entry->seconds, .tv_nsec = entry->nanoseconds}};
    if (fchown(fd, entry->uid, entry->gid))
        return errno == EINVAL ? EOVERFLOW : errno; /* a container has ids up to 65,535 */
    if (fchmod(fd, entry->mode & 07777))
        return errno;
    for (int i = 0; i < entry->xattr_count; i++) {
        char name[XATTR_NAME_MAX + 1];
        size_t length = take_number(&frame, 4);
        if (frame.bad || length > XATTR_NAME_MAX || length > (size_t)(frame.end - frame.at))
            return EPROTO;
        memcpy(name, frame.at, length);
        name[length] = 0;
        frame.at += length;
        size_t size = take_number(&frame, 4);
        if (frame.bad || size > (size_t)(frame.end - frame.at))
            return EPROTO;
        if (fsetxattr(fd, name, frame.at, size, 0) && errno != EOPNOTSUPP)
            return errno;
        frame.at += size;
    }
    return futimens(fd, times) ? errno : 0;
}

/* Not for nothing: ext4 writes a file out at its close when it was ever cut to nothing (auto_da_alloc, ext4(5)). */
static bool resize(uint64_t size) {
    struct stat status;
    return !fstat(put.file, &status) && ((uint64_t)status.st_size == size || !ftruncate(put.file, (off_t)size));
}

/* The partial copy is ours alone, is still under its name, and has what is to be gone on with. */
static bool is_ours(uint64_t offset) {
    struct stat opened, named;
    return !fstat(put.file, &opened) && S_ISREG(opened.st_mode) && !flock(put.file, LOCK_EX | LOCK_NB) &&
           !fstatat(put.parent, put.partial, &named, AT_SYMLINK_NOFOLLOW) && named.st_ino == opened.st_ino &&
           opened.st_nlink == 1 && (uint64_t)opened.st_size >= offset;
}

static void begin_file(const struct files_entry *entry) {
    put.entry = *entry;
    memcpy(put.xattrs, entry->xattrs, entry->xattrs_size);
    put.entry.xattrs = put.xattrs;
    put.resumable = entry->tag != 0;
    for (uint64_t tag = entry->tag;; tag = 0) {
        int flags = O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | (tag ? 0 : O_EXCL);
        name_partial(tag);
        put.file = openat(put.parent, put.partial, flags, 0600);
        if (put.file < 0)
            return fail(errno);
        if (!tag || is_ours(entry->offset))
            break;
        /* Someone else is at the very same: two copies of one file must not write into one. */
        put.resumable = false;
        close(put.file);
        put.file = -1;
        if (entry->offset)
            return fail(EAGAIN);
    }
    if (!resize(entry->offset))
        fail(errno);
}

/* What comes for a file that has failed is taken and thrown away. */
void put_data(uint64_t offset) {
    while (wire_left()) {
        ssize_t moved = put.file >= 0 ? wire_splice(put.file, offset) : 0;
        size_t size = 0;
        const uint8_t *piece = moved ? NULL : wire_piece(&size);
        offset += moved > 0 ? (uint64_t)moved : 0;
        while (put.file >= 0 && size) {
            ssize_t done = pwrite(put.file, piece, size, (off_t)offset);
            if (done < 0 && errno == EINTR)
                continue;
            if (done < 0) {
                moved = -1;
                break;
            }
            piece += done;
            offset += (uint64_t)done;
            size -= (size_t)done;
        }
        if (moved < 0)
            fail(errno);
    }
}

void put_finish(uint64_t size) {
    if (put.file >= 0) {
        int number = resize(size) ? dress(put.file, &put.entry) : errno;
        if (!number && renameat(put.parent, put.partial, put.parent, put.name))
            number = errno;
        if (number)
            fail(number);
    }
    let_go();
    put.open = false;
}

static void make_directory(const struct files_entry *entry) {
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = entry->seconds, .tv_nsec = entry->nanoseconds}};
    struct stat status;
    if (entry->flags & FILES_TIMES_ONLY) {
        if (utimensat(put.parent, put.name, times, AT_SYMLINK_NOFOLLOW))
            fail(errno);
        return;
    }
    if (mkdirat(put.parent, put.name, 0700)) {
        /* One that is there stays as it is, also behind a link. */
        int number = errno;
        if (number != EEXIST || fstatat(put.parent, put.name, &status, 0) || !S_ISDIR(status.st_mode))
            fail(number == EEXIST ? ENOTDIR : number);
        return;
    }
    int fd = openat(put.parent, put.name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int number = fd < 0 ? errno : dress(fd, entry);
    if (fd >= 0)
        close(fd);
    if (number)
        fail(number);
}

/* Links and pipes are made under another name first, because they take the place of what is there. */
static void make_other(const struct files_entry *entry) {
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = entry->seconds, .tv_nsec = entry->nanoseconds}};
    int made;
    name_partial(0);
    if (entry->kind == 'l')
        made = symlinkat(entry->target, put.parent, put.partial);
    else if (entry->kind == 'h')
        made = linkat(AT_FDCWD, entry->target, put.parent, put.partial, 0);
    else
        made = mkfifoat(put.parent, put.partial, 0600);
    if (made)
        return fail(errno);
    bool failed = entry->kind != 'h' && fchownat(put.parent, put.partial, entry->uid, entry->gid, AT_SYMLINK_NOFOLLOW);
    errno = failed && errno == EINVAL ? EOVERFLOW : errno;
    failed = failed || (entry->kind == 'p' && fchmodat(put.parent, put.partial, entry->mode & 07777, 0));
    failed = failed || (entry->kind != 'h' && utimensat(put.parent, put.partial, times, AT_SYMLINK_NOFOLLOW));
    failed = failed || renameat(put.parent, put.partial, put.parent, put.name);
    int number = errno;
    unlinkat(put.parent, put.partial, 0); /* rename(2) leaves the second name of one file alone */
    if (failed)
        fail(number);
}

void put_entry(const struct files_entry *entry) {
    put_abandon();
    put.open = entry->kind == 'f';
    put.parent = open_place(entry->path);
    if (put.parent < 0)
        return fail(errno);
    if (entry->kind == 'f')
        return begin_file(entry);
    if (entry->kind == 'd')
        make_directory(entry);
    else if (entry->kind == 'l' || entry->kind == 'h' || entry->kind == 'p')
        make_other(entry);
    else
        fail(EINVAL);
    let_go();
}
