/* Devices of the machine: at its start, and when the host plugs one in or out (request `d:` of session.c).
 *
 * A device is a row of netstrings:
 *   volume SERIAL PATH          mount the ext4 on the disk with this serial
 *   folder TAG PATH ro|rw       mount a directory of the host (virtiofs)
 *   disk NAME                   name the disk with this serial in /dev/disk/by-name
 *   card TEXT                   a network card, as the configuration has it
 *   unmount PATH                let go of a volume or folder
 *   release NAME                let go of a disk
 *   hardware                    tell, as `key value` lines, how the kernel knows its hypervisor and whose drivers it has
 * Exit codes of a request: 0, BUSY where the machine still uses it, FAILED with the reason on standard error.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <cpuid.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define FAILED 1
#define BUSY 16
#define MAX_WORDS 4
#define WAIT_MS 20000
#define POLL_MS 20
#define BY_NAME "/dev/disk/by-name"

static int fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    return FAILED;
}

/* Of a virtio disk from its own file, of a SATA one from the page that SCSI has for it (4 bytes of head, then spaces). */
const char *disk_serial(const char *disk) {
    static char serial[64];
    char path[300];
    size_t size = 0, head = 0;
    snprintf(path, sizeof path, "/sys/block/%s/serial", disk);
    char *text = read_file(path, &size);
    if (!text) {
        snprintf(path, sizeof path, "/sys/block/%s/device/vpd_pg80", disk);
        text = read_file(path, &size);
        head = 4;
    }
    *serial = 0;
    if (text && size > head)
        snprintf(serial, sizeof serial, "%s", strtok(text + head, " \n") ?: "");
    free(text);
    return serial;
}

/* The node of the disk with this serial, which may be a moment away; NULL if it does not come. */
static const char *find_disk(const char *serial) {
    static char node[64];
    for (int waited = 0; waited < WAIT_MS; waited += POLL_MS) {
        DIR *disks = opendir("/sys/block");
        struct dirent *entry;
        bool found = false;
        while (disks && !found && (entry = readdir(disks))) {
            snprintf(node, sizeof node, "/dev/%.40s", entry->d_name);
            found = entry->d_name[0] != '.' && !strcmp(disk_serial(entry->d_name), serial) && !access(node, F_OK);
        }
        if (disks)
            closedir(disks);
        if (found)
            return node;
        usleep(POLL_MS * 1000);
    }
    return NULL;
}

static void make_folders(const char *path) {
    char made[1100];
    snprintf(made, sizeof made, "%s", path);
    for (char *slash = strchr(made + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(made, 0755);
        *slash = '/';
    }
    mkdir(made, 0755);
}

/* Whether the very thing is mounted there already. */
static bool is_mounted(const char *source, const char *path) {
    char *mounts = read_file("/proc/self/mounts", NULL), wanted[1300], real[4096];
    if (!mounts || !realpath(path, real))
        return false;
    snprintf(wanted, sizeof wanted, "%s %.1200s ", source, real);
    bool found = !strncmp(mounts, wanted, strlen(wanted));
    for (char *at = mounts; !found && (at = strchr(at, '\n')); at++)
        found = !strncmp(at + 1, wanted, strlen(wanted));
    free(mounts);
    return found;
}

static int mount_volume(const char *serial, const char *path) {
    const char *node = find_disk(serial);
    if (!node)
        return fail("disk '%s' does not show up in the machine", serial);
    make_folders(path);
    if (!is_mounted(node, path) && mount(node, path, "ext4", MS_NODEV | MS_NOATIME, "discard,errors=remount-ro"))
        return fail("cannot mount the volume at %s: %s", path, strerror(errno));
    return 0;
}

static int mount_folder(const char *tag, const char *path, bool read_only) {
    make_folders(path);
    unsigned long flags = MS_NOSUID | MS_NODEV | (read_only ? MS_RDONLY : 0);
    for (int waited = 0; !is_mounted(tag, path) && mount(tag, path, "virtiofs", flags, NULL); waited += POLL_MS) {
        /* EINVAL: no such tag yet. */
        if (errno != EINVAL || waited >= WAIT_MS)
            return fail("cannot mount the folder at %s: %s", path, strerror(errno));
        usleep(POLL_MS * 1000);
    }
    return 0;
}

static int name_disk(const char *name) {
    const char *node = find_disk(name);
    char link[100];
    if (!node)
        return fail("disk '%s' does not show up in the machine", name);
    make_folders(BY_NAME);
    snprintf(link, sizeof link, BY_NAME "/%s", name);
    unlink(link);
    return symlink(node, link) ? fail("cannot make %s: %s", link, strerror(errno)) : 0;
}

static int release_disk(const char *name) {
    char link[100];
    snprintf(link, sizeof link, BY_NAME "/%s", name);
    int disk = open(link, O_RDONLY | O_EXCL | O_CLOEXEC);
    if (disk < 0 && errno == EBUSY)
        return BUSY;
    close(disk);
    unlink(link);
    return 0;
}

static int unmount(const char *path) {
    if (!umount2(path, 0) || errno == EINVAL || errno == ENOENT)
        return 0;
    return errno == EBUSY ? BUSY : fail("cannot unmount %s: %s", path, strerror(errno));
}

static void tell_file(const char *key, const char *path) {
    char *text = read_file(path, NULL);
    if (text)
        printf("%s %s\n", key, strtok(text, "\n") ?: "");
    free(text);
}

/* The drivers that devices of a class are bound to. */
static void tell_drivers(const char *key, const char *class) {
    DIR *devices = opendir(class);
    struct dirent *entry;
    char path[400], driver[256];
    while (devices && (entry = readdir(devices))) {
        snprintf(path, sizeof path, "%s/%s/device/driver", class, entry->d_name);
        ssize_t length = entry->d_name[0] == '.' ? -1 : readlink(path, driver, sizeof driver - 1);
        driver[length < 0 ? 0 : length] = 0;
        if (length > 0)
            printf("%s %s %s\n", key, entry->d_name, strrchr(driver, '/') ? strrchr(driver, '/') + 1 : driver);
    }
    if (devices)
        closedir(devices);
}

/* What the processor says at 0x40000000 is the hypervisor's name; 2.12 is the boot protocol of a PVH start (pvh/enlighten.c). */
static int tell_hardware(void) {
    unsigned eax, name[4] = {0};
    __cpuid(0x40000000, eax, name[0], name[1], name[2]);
    printf("hypervisor %.12s\n", (char *)name);
    tell_file("boot-protocol", "/sys/kernel/boot_params/version");
    tell_file("xen", "/sys/hypervisor/type");
    tell_file("clock", "/sys/devices/system/clocksource/clocksource0/current_clocksource");
    tell_file("clocks", "/sys/devices/system/clocksource/clocksource0/available_clocksource");
    tell_file("kernel", "/proc/sys/kernel/osrelease");
    tell_drivers("net", "/sys/class/net");
    tell_drivers("block", "/sys/block");
    fflush(stdout);
    return 0;
}

/* In the hidden root: what the kernel has to have for it. */
static void load_for(const char *kind) {
    if (!strcmp(kind, "folder") && access("/sys/module/virtiofs", F_OK))
        load_modules("/modules/folder");
    if (!strcmp(kind, "card") && access("/sys/module/virtio_net", F_OK))
        load_modules("/modules/network");
}

static int perform(char *row, size_t size, const char *root) {
    char *words[MAX_WORDS] = {"", "", "", ""}, *end = row + size, *word;
    for (int count = 0; count < MAX_WORDS && (word = next_word(&row, end)); count++)
        words[count] = word;
    load_for(words[0]);
    if (!strcmp(words[0], "card"))
        return plug_card(words[1]) ? 0 : fail("the network card does not show up in the machine");
    if (chroot(root) || chdir("/"))
        return fail("cannot enter the machine: %s", strerror(errno));
    if (!strcmp(words[0], "volume"))
        return mount_volume(words[1], words[2]);
    if (!strcmp(words[0], "folder"))
        return mount_folder(words[1], words[2], !strcmp(words[3], "ro"));
    if (!strcmp(words[0], "disk"))
        return name_disk(words[1]);
    if (!strcmp(words[0], "hardware"))
        return tell_hardware();
    if (!strcmp(words[0], "release"))
        return release_disk(words[1]);
    if (!strcmp(words[0], "unmount"))
        return unmount(words[1]);
    return fail("unknown device '%.40s'", words[0]);
}

int serve_device(char *row, size_t size) {
    return perform(row, size, "/machine");
}

/* Before the machine's own first process; each in a child, since it enters the machine's root. */
void plug_devices(void) {
    int status;
    for (int i = 0; config("device", i); i++) {
        char *row = config("device", i);
        pid_t child = fork();
        if (child == 0)
            _exit(perform(row, strlen(row), "/new"));
        if (child > 0 && waitpid(child, &status, 0) == child && status)
            give_up("device %d cannot be plugged in", i);
    }
}

/* An init without an exit hook leaves its volumes mounted: put their filesystems away before the power goes. */
void release_volumes(void) {
    pid_t child = fork();
    if (child == 0) {
        char device[200], place[1100], kind[40];
        FILE *mounts = chroot("/machine") || chdir("/") ? NULL : fopen("/proc/self/mounts", "re");
        while (mounts && fscanf(mounts, "%199s %1099s %39s %*[^\n]", device, place, kind) == 3)
            if (!strcmp(kind, "ext4") && umount2(place, 0))
                mount(NULL, place, NULL, MS_REMOUNT | MS_RDONLY, NULL);
        _exit(0);
    }
    if (child > 0)
        waitpid(child, NULL, 0);
}
