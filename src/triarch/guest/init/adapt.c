/* Taking up what the host plugged in while the machine runs: processors, and room on the delta. */
#define _GNU_SOURCE
#include "guest.h"
#include "protocol.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define EXT4_IOC_RESIZE_FS _IOW('f', 16, uint64_t)
#define EXT4_BLOCK_BYTES 4096
#define NODE "/delta-disk"
#define PLACE "/delta-place"

/* Let the first `wanted` processors work and no others; 0 leaves them as they are. How many work then. */
static uint32_t use_processors(uint32_t wanted) {
    DIR *processors = opendir("/sys/devices/system/cpu");
    struct dirent *entry;
    while (wanted && processors && (entry = readdir(processors))) {
        char path[320];
        unsigned number;
        if (sscanf(entry->d_name, "cpu%u", &number) != 1)
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/%s/online", entry->d_name);
        char *online = read_file(path, NULL);
        const char *state = number < wanted ? "1" : "0";
        if (online && *online != *state)
            write_file(path, state, 1, 0);
        free(online);
    }
    if (processors)
        closedir(processors);
    long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? (uint32_t)count : 0;
}

/* No path leads to the delta's filesystem any more: mounting the disk once more shows the same one. */
static int grow_filesystem(uint64_t blocks) {
    mkdir(PLACE, 0700);
    if (mount(NODE, PLACE, "ext4", MS_NOATIME, NULL))
        return errno;
    int root = open(PLACE, O_RDONLY | O_DIRECTORY | O_CLOEXEC), error = 0;
    if (root < 0 || ioctl(root, EXT4_IOC_RESIZE_FS, &blocks))
        error = errno;
    close(root);
    umount2(PLACE, MNT_DETACH);
    return error;
}

static int grow_delta(uint64_t *bytes) {
    unsigned own_major, own_minor;
    char *delta = read_file(DELTA_FILE, NULL);
    if (!delta || sscanf(delta, "%u:%u", &own_major, &own_minor) != 2)
        return ENODEV;
    free(delta);
    mknod(NODE, S_IFBLK | 0600, makedev(own_major, own_minor));
    int disk = open(NODE, O_RDONLY | O_CLOEXEC), error = 0;
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, bytes))
        error = errno;
    close(disk);
    return error ? error : grow_filesystem(*bytes / EXT4_BLOCK_BYTES);
}

void adapt(uint32_t processors) {
    uint8_t frame[HEADER_BYTES + 24];
    uint64_t bytes = 0, memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    put_header(frame, FRAME_ADAPTED, 24);
    put_u32(frame + HEADER_BYTES, use_processors(processors));
    put_u32(frame + HEADER_BYTES + 4, (uint32_t)grow_delta(&bytes));
    put_u32(frame + HEADER_BYTES + 8, (uint32_t)(bytes >> 32));
    put_u32(frame + HEADER_BYTES + 12, (uint32_t)bytes);
    put_u32(frame + HEADER_BYTES + 16, (uint32_t)(memory >> 32));
    put_u32(frame + HEADER_BYTES + 20, (uint32_t)memory);
    if (write(control_port, frame, sizeof frame) < 0)
        errno = 0; /* whoever asked has gone */
}
