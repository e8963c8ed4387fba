/* Reading and removing trees. Every step below the named object is relative to an open directory and follows no link. */
#define _GNU_SOURCE
#include "files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#define OPEN_FLAGS (O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC)
#define MAX_PATH_BYTES (8 * PATH_MAX)
#define MAX_XATTR_BYTES (64 << 10)
#define MIN_HOLE_BYTES 4096
#ifndef CGROUP2_SUPER_MAGIC
#define CGROUP2_SUPER_MAGIC 0x63677270
#endif

/* Where a walk is: the path from the named object, "" for itself, and how it is read. */
static struct walk {
    char path[MAX_PATH_BYTES];
    size_t length;
    uint32_t flags;
    uint64_t offset, count;
} walk;

/* Files with several names, by their inode: the first name that was met. */
static struct linked {
    struct linked *next;
    dev_t device;
    ino_t inode;
    char path[];
} *linked[4096];

static void forget_links(void) {
    for (size_t i = 0; i < sizeof linked / sizeof *linked; i++)
        for (struct linked *each = linked[i], *next; each; each = next) {
            next = each->next;
            free(each);
            linked[i] = NULL;
        }
}

static const char *first_name(const struct stat *status) {
    struct linked **slot = &linked[(status->st_ino ^ status->st_dev * 31) % (sizeof linked / sizeof *linked)];
    for (struct linked *each = *slot; each; each = each->next)
        if (each->inode == status->st_ino && each->device == status->st_dev)
            return each->path;
    struct linked *added = malloc(sizeof *added + walk.length + 1);
    if (added) {
        *added = (struct linked){.next = *slot, .device = status->st_dev, .inode = status->st_ino};
        memcpy(added->path, walk.path, walk.length + 1);
        *slot = added;
    }
    return NULL;
}

static char kind_of(mode_t mode) {
    static const char kinds[] = {[S_IFREG >> 12] = 'f', [S_IFDIR >> 12] = 'd', [S_IFLNK >> 12] = 'l', [S_IFIFO >> 12] = 'p',
                                 [S_IFCHR >> 12] = 'c', [S_IFBLK >> 12] = 'b', [S_IFSOCK >> 12] = 's'};
    return kinds[mode >> 12 & 15];
}

static bool is_kept(const char *name) {
    return !strncmp(name, "user.", 5) || !strcmp(name, "security.capability") || !strncmp(name, "system.posix_acl_", 17);
}

/* Extended attributes of an open object; none where it has none, or where the file system keeps none. */
static void put_xattrs(int fd) {
    static char names[MAX_XATTR_BYTES], value[MAX_XATTR_BYTES];
    ssize_t size = fd < 0 ? 0 : flistxattr(fd, names, sizeof names);
    uint8_t *count_at = wire_room(2);
    uint16_t count = 0;
    wire_take(2);
    for (char *name = names; name < names + size; name += strlen(name) + 1) {
        ssize_t length = is_kept(name) ? fgetxattr(fd, name, value, sizeof value) : -1;
        if (length < 0 || !wire_room(8 + strlen(name) + (size_t)length))
            continue;
        wire_u32((uint32_t)strlen(name));
        wire_bytes(name, strlen(name));
        wire_u32((uint32_t)length);
        wire_bytes(value, (size_t)length);
        count++;
    }
    count_at[0] = (uint8_t)(count >> 8);
    count_at[1] = (uint8_t)count;
    wire_end();
}

static void tell(const struct stat *status, const char *path, char kind, const char *target, int xattrs_of) {
    bool is_device = kind == 'c' || kind == 'b';
    struct files_entry entry = {
        .kind = kind,
        .mode = status->st_mode & 07777,
        .uid = status->st_uid,
        .gid = status->st_gid,
        .size = is_device ? status->st_rdev : kind == 'f' ? (uint64_t)status->st_size : 0,
        .seconds = status->st_mtim.tv_sec,
        .nanoseconds = (uint32_t)status->st_mtim.tv_nsec,
        .path = path,
        .target = target,
    };
    wire_entry(&entry);
    put_xattrs(xattrs_of);
    walk.count++;
}

static bool read_target(int directory, const char *name, char target[PATH_MAX]) {
    ssize_t size = readlinkat(directory, name, target, PATH_MAX - 1);
    if (size >= 0)
        target[size] = 0;
    return size >= 0;
}

/* Send `size` bytes from `offset`, or what is there of them; returns where it stopped. */
static uint64_t send_extent(int file, uint64_t offset, uint64_t size, struct sha256 *sum) {
    while (size) {
        size_t part = size < FILES_MAX_DATA_BYTES ? size : FILES_MAX_DATA_BYTES;
        wire_begin(FILES_DATA);
        wire_u64(offset);
        uint8_t *room = wire_room(part);
        ssize_t got = pread(file, room, part, (off_t)offset);
        if (got < 0 && errno == EINTR)
            got = 0, part = 0;
        wire_take(got > 0 ? (size_t)got : 0);
        wire_end();
        if (got <= 0 && part)
            break;
        if (sum)
            sha256_add(sum, room, (size_t)got);
        offset += (uint64_t)got;
        size -= (uint64_t)got;
    }
    return offset;
}

/* Feed a sum from a file without sending anything; returns where it stopped. */
static uint64_t add_extent(int file, uint64_t offset, uint64_t size, struct sha256 *sum) {
    static uint8_t piece[FILES_MAX_DATA_BYTES];
    while (size) {
        ssize_t got = pread(file, piece, size < sizeof piece ? size : sizeof piece, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        sha256_add(sum, piece, (size_t)got);
        offset += (uint64_t)got;
        size -= (uint64_t)got;
    }
    return offset;
}

/* The content as it is now, up to the size that was told: what grows meanwhile is left out, holes are not sent. */
static uint64_t send_content(int file, const struct stat *status) {
    uint64_t size = (uint64_t)status->st_size, at = walk.offset < size ? walk.offset : size;
    if (!size)
        return send_extent(file, 0, FILES_MAX_UNSIZED_BYTES, NULL);
    if ((uint64_t)status->st_blocks * 512 + MIN_HOLE_BYTES > size)
        return send_extent(file, at, at < size ? size - at : 0, NULL);
    while (at < size) {
        off_t data = lseek(file, (off_t)at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return size; /* a hole to the end */
        off_t hole = data < 0 ? -1 : lseek(file, data, SEEK_HOLE);
        uint64_t from = data < 0 ? at : (uint64_t)data, to = hole < 0 || (uint64_t)hole > size ? size : (uint64_t)hole;
        if (from >= size)
            return size;
        at = send_extent(file, from, to - from, NULL);
        if (at < to)
            break;
    }
    return at;
}

static void finish(uint64_t size, const uint8_t *digest) {
    wire_begin(FILES_FINISH);
    wire_u64(size);
    if (digest)
        wire_bytes(digest, 32);
    wire_end();
}

/* A device or a pipe must never be opened: doing so may wait, rewind a tape, or worse. */
static int open_same(int directory, const char *name, const struct stat *status) {
    struct stat opened;
    int fd = openat(directory, name, OPEN_FLAGS | (S_ISDIR(status->st_mode) ? O_DIRECTORY : 0));
    if (fd < 0)
        return -1;
    if (!fstat(fd, &opened) && opened.st_ino == status->st_ino && S_ISREG(opened.st_mode) == S_ISREG(status->st_mode))
        return fd;
    close(fd);
    errno = ESTALE;
    return -1;
}

static void send_file(int directory, const char *name, const struct stat *status) {
    const char *first = status->st_nlink > 1 ? first_name(status) : NULL;
    if (first) {
        tell(status, walk.path, 'h', first, -1);
        return;
    }
    int file = open_same(directory, name, status);
    if (file < 0) {
        wire_error(errno, walk.path);
        return;
    }
    tell(status, walk.path, 'f', NULL, file);
    if (walk.flags & FILES_SUM) {
        struct sha256 sum;
        uint8_t digest[32];
        sha256_begin(&sum);
        uint64_t end = walk.flags & FILES_NO_DATA ? add_extent(file, 0, (uint64_t)status->st_size, &sum)
                                                  : send_extent(file, 0, (uint64_t)status->st_size, &sum);
        sha256_end(&sum, digest);
        finish(end, digest);
    } else if (!(walk.flags & FILES_NO_DATA)) {
        finish(send_content(file, status), NULL);
    }
    close(file);
}

/* What the kernel shows of itself is no part of a machine's files, and much of it has no end. */
static bool is_kernels(int directory) {
    static const long kernels[] = {PROC_SUPER_MAGIC, SYSFS_MAGIC, DEVPTS_SUPER_MAGIC, CGROUP_SUPER_MAGIC,
                                   CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, TRACEFS_MAGIC, SECURITYFS_MAGIC,
                                   BPF_FS_MAGIC, 0x19800202 /* mqueue */, PSTOREFS_MAGIC, 0x62656570 /* configfs */,
                                   0x65735543 /* fusectl */, BINFMTFS_MAGIC, EFIVARFS_MAGIC, NSFS_MAGIC};
    struct statfs about;
    if (fstatfs(directory, &about))
        return true;
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (about.f_type == kernels[i])
            return true;
    return false;
}

static bool is_dot(const char *name) {
    return !strcmp(name, ".") || !strcmp(name, "..");
}

static void send_object(int directory, const char *name, const struct stat *status);

static void send_below(int fd) {
    DIR *stream = fdopendir(fd);
    struct dirent *found;
    size_t length = walk.length;
    while (stream && (found = readdir(stream))) {
        struct stat status;
        size_t added = strlen(found->d_name) + (length ? 1 : 0);
        if (is_dot(found->d_name))
            continue;
        if (length + added >= sizeof walk.path) {
            wire_error(ENAMETOOLONG, walk.path);
            break;
        }
        sprintf(walk.path + length, "%s%s", length ? "/" : "", found->d_name);
        walk.length = length + added;
        if (!fstatat(fd, found->d_name, &status, AT_SYMLINK_NOFOLLOW))
            send_object(fd, found->d_name, &status);
        else if (errno != ENOENT) /* gone since it was listed: not there */
            wire_error(errno, walk.path);
        walk.path[walk.length = length] = 0;
    }
    stream ? closedir(stream) : close(fd);
}

static void send_directory(int directory, const char *name, const struct stat *status) {
    int fd = open_same(directory, name, status);
    if (fd < 0) {
        wire_error(errno, walk.path);
        return;
    }
    tell(status, walk.path, 'd', NULL, fd);
    if (walk.flags & FILES_RECURSIVE && !is_kernels(fd)) {
        send_below(fd);
    } else {
        if (walk.flags & FILES_RECURSIVE)
            wire_error(EXDEV, walk.path);
        close(fd);
    }
}

static void send_object(int directory, const char *name, const struct stat *status) {
    char target[PATH_MAX];
    if (S_ISREG(status->st_mode))
        send_file(directory, name, status);
    else if (S_ISDIR(status->st_mode))
        send_directory(directory, name, status);
    else if (!S_ISLNK(status->st_mode))
        tell(status, walk.path, kind_of(status->st_mode), NULL, -1);
    else if (read_target(directory, name, target))
        tell(status, walk.path, 'l', target, -1);
    else
        wire_error(errno, walk.path);
}

/* Open the directory that holds `path`, and point `name` at its last part ("." for the root itself). */
static int open_parent(const char *path, char *room, const char **name) {
    size_t size = strlen(path);
    memcpy(room, path, size + 1);
    while (size > 1 && room[size - 1] == '/')
        room[--size] = 0;
    char *slash = strrchr(room, '/');
    *name = slash[1] ? slash + 1 : ".";
    *slash = 0;
    return open(*room ? room : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
}

/* Where a path leads. */
static char followed[PATH_MAX];

static int find(const char *path, uint32_t flags, char *room, const char **name, struct stat *status) {
    if (flags & FILES_FOLLOW && !realpath(path, followed))
        return -1;
    if (flags & FILES_FOLLOW)
        path = followed;
    int parent = open_parent(path, room, name);
    if (parent >= 0 && fstatat(parent, *name, status, AT_SYMLINK_NOFOLLOW)) {
        int number = errno;
        close(parent);
        errno = number;
        return -1;
    }
    return parent;
}

void tree_stat(const char *path, uint32_t flags) {
    char room[PATH_MAX], target[PATH_MAX] = "";
    const char *name;
    struct stat status;
    int parent = find(path, flags, room, &name, &status);
    if (parent < 0) {
        wire_error(errno, path);
        return;
    }
    if (S_ISLNK(status.st_mode))
        read_target(parent, name, target);
    tell(&status, flags & FILES_FOLLOW ? followed : path, kind_of(status.st_mode), target, -1);
    close(parent);
}

void tree_list(const char *path) {
    DIR *stream = opendir(path);
    struct dirent *found;
    walk.count = 0;
    if (!stream)
        wire_error(errno, path);
    while (stream && (found = readdir(stream))) {
        char target[PATH_MAX] = "";
        struct stat status;
        if (is_dot(found->d_name) || fstatat(dirfd(stream), found->d_name, &status, AT_SYMLINK_NOFOLLOW))
            continue;
        if (S_ISLNK(status.st_mode))
            read_target(dirfd(stream), found->d_name, target);
        tell(&status, found->d_name, kind_of(status.st_mode), target, -1);
    }
    if (stream)
        closedir(stream);
    wire_done(walk.count);
}

void tree_get(const char *path, uint32_t flags, uint64_t offset) {
    char room[PATH_MAX];
    const char *name;
    struct stat status;
    walk.path[walk.length = 0] = 0;
    walk.flags = flags;
    walk.offset = offset;
    walk.count = 0;
    int parent = find(path, flags, room, &name, &status);
    if (parent >= 0)
        send_object(parent, name, &status);
    else
        wire_error(errno, path);
    close(parent);
    forget_links();
    wire_done(walk.count);
}

void tree_hash(const char *path, uint64_t length) {
    char room[PATH_MAX];
    const char *name;
    struct stat status;
    struct sha256 sum;
    uint8_t digest[32];
    int parent = find(path, 0, room, &name, &status), file = -1;
    errno = parent < 0 ? errno : EINVAL;
    if (parent >= 0 && S_ISREG(status.st_mode))
        file = open_same(parent, name, &status);
    int number = errno;
    close(parent);
    if (file < 0) {
        wire_error(number, path);
        return;
    }
    sha256_begin(&sum);
    uint64_t end = add_extent(file, 0, length, &sum);
    sha256_end(&sum, digest);
    close(file);
    finish(end, digest);
}

/* A file system that is mounted below is not this machine's to empty. */
static void remove_object(int directory, const char *name, dev_t device, uint32_t flags) {
    struct stat status;
    if (!unlinkat(directory, name, 0)) {
        walk.count++;
        return;
    }
    int fd = -1;
    if ((errno == EISDIR || errno == EPERM) && flags & FILES_RECURSIVE)
        fd = openat(directory, name, OPEN_FLAGS | O_DIRECTORY);
    DIR *stream = fd >= 0 && !fstat(fd, &status) && status.st_dev == device ? fdopendir(fd) : NULL;
    if (stream) {
        size_t length = walk.length;
        for (struct dirent *found; (found = readdir(stream));) {
            if (is_dot(found->d_name) || length + strlen(found->d_name) + 1 >= sizeof walk.path)
                continue;
            walk.length = length + (size_t)sprintf(walk.path + length, "/%s", found->d_name);
            remove_object(fd, found->d_name, device, flags);
            walk.path[walk.length = length] = 0;
        }
        closedir(stream);
    } else if (fd >= 0) {
        close(fd);
        errno = EXDEV;
    }
    if ((fd < 0 || stream) && !unlinkat(directory, name, AT_REMOVEDIR))
        walk.count++;
    else
        wire_error(errno, walk.path);
}

void tree_remove(const char *path, uint32_t flags) {
    char room[PATH_MAX];
    const char *name;
    struct stat status, root;
    walk.count = 0;
    int parent = find(path, 0, room, &name, &status);
    if (parent < 0) {
        wire_error(errno, path);
    } else if (!strcmp(name, ".") || !strcmp(name, "..") || stat("/", &root) ||
               (root.st_ino == status.st_ino && root.st_dev == status.st_dev)) {
        wire_error(EBUSY, path);
    } else {
        struct stat above;
        walk.length = (size_t)snprintf(walk.path, sizeof walk.path, "%s", path);
        remove_object(parent, name, fstat(parent, &above) ? 0 : above.st_dev, flags);
    }
    close(parent);
    wire_done(walk.count);
}
