/* PID 1: modules, configuration, disks, overlay, then the machine's init or command. */
#define _GNU_SOURCE
#include "guest.h"
#include "protocol.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <unistd.h>

#define DEVICE_TIMEOUT_MS 10000

static struct record {
    const char *key;
    char *value;
    size_t size;
} records[MAX_RECORDS];
static int record_count;
static char layer_device[MAX_LAYERS][32], delta_device[32], modules_device[32];
static int agent_port = -1;

static struct record *find_record(const char *key, int nth) {
    for (int i = 0; i < record_count; i++)
        if (!strcmp(records[i].key, key) && nth-- == 0)
            return &records[i];
    return NULL;
}

char *config(const char *key, int nth) {
    struct record *record = find_record(key, nth);
    return record ? record->value : NULL;
}

size_t config_size(const char *key) {
    struct record *record = find_record(key, 0);
    return record ? record->size : 0;
}

int config_count(const char *key) {
    int count = 0;
    while (find_record(key, count))
        count++;
    return count;
}

/* Read through the fw_cfg device's own registers (QEMU docs/specs/fw_cfg): one pass, and no module for it. */
static size_t read_fw_cfg(const char *name, char *data, size_t room) {
    enum { SELECTOR = 0x510, DATA = 0x511, DIRECTORY = 0x19 };
    uint8_t count[4], entry[64];
    if (ioperm(SELECTOR, 2, 1))
        return 0;
    outw(DIRECTORY, SELECTOR);
    insb(DATA, count, sizeof count);
    for (uint32_t left = get_u32(count); left && left < 1000; left--) {
        insb(DATA, entry, sizeof entry);
        if (strncmp((char *)entry + 8, name, sizeof entry - 8))
            continue;
        size_t size = get_u32(entry) < room ? get_u32(entry) : room;
        outw((unsigned short)(entry[4] << 8 | entry[5]), SELECTOR);
        insb(DATA, data, size);
        return size;
    }
    return 0;
}

/* Records are `key length:value` and a newline, which becomes the value's NUL. */
static void read_config(void) {
    static char text[MAX_CONFIG_BYTES + 1];
    size_t size = read_fw_cfg(FW_CFG_KEY, text, MAX_CONFIG_BYTES);
    char *at = text, *end = text + size;
    while (at < end && record_count < MAX_RECORDS) {
        char *space = strchr(at, ' ');
        char *colon = space ? strchr(space, ':') : NULL;
        size_t length = colon ? strtoul(space + 1, NULL, 10) : 0;
        if (!colon || length >= (size_t)(end - colon - 1))
            give_up("the configuration from the host is damaged");
        *space = 0;
        records[record_count++] = (struct record){at, colon + 1, length};
        at = colon + 1 + length;
        *at++ = 0;
    }
    if (!record_count)
        give_up("the host gave no configuration (fw_cfg " FW_CFG_KEY ")");
}

void load_modules(const char *list) {
    char *names = read_file(list, NULL);
    for (char *name = names ? strtok(names, "\n") : NULL; name; name = strtok(NULL, "\n")) {
        char path[100];
        snprintf(path, sizeof path, "/modules/%s", name);
        int module = open(path, O_RDONLY | O_CLOEXEC);
        if (module < 0 || (syscall(SYS_finit_module, module, "", 0) && errno != EEXIST))
            say("cannot load module %s: %m", name);
        close(module);
        unlink(path); /* the initramfs is memory */
    }
    free(names);
}

static bool uses_pmem(void) {
    for (int i = 0; config("layer", i); i++)
        if (!strcmp(config("layer", i), "pmem"))
            return true;
    return false;
}

static void find_disks(void) {
    DIR *disks = opendir("/sys/block");
    struct dirent *entry;
    while (disks && (entry = readdir(disks))) {
        char device[32];
        unsigned layer;
        snprintf(device, sizeof device, "/dev/%.20s", entry->d_name);
        /* The hardware of real machines has no way to say that a disk may only be read but a CD. */
        if (!strcmp(entry->d_name, "sr0") && !access(device, F_OK))
            strcpy(modules_device, device);
        if ((strncmp(entry->d_name, "vd", 2) && strncmp(entry->d_name, "sd", 2)) || access(device, F_OK))
            continue;
        const char *serial = disk_serial(entry->d_name);
        if (!strcmp(serial, DELTA_SERIAL))
            strcpy(delta_device, device);
        else if (!strcmp(serial, MODULES_SERIAL))
            strcpy(modules_device, device);
        else if (sscanf(serial, LAYER_SERIAL "%u", &layer) == 1 && layer < MAX_LAYERS)
            strcpy(layer_device[layer], device);
    }
    if (disks)
        closedir(disks);
}

/* What is still missing, NULL if nothing is. */
static const char *find_devices(void) {
    static char missing[40];
    find_disks();
    for (int i = 0, pmem = 0; config("layer", i); i++) {
        if (!strcmp(config("layer", i), "pmem"))
            snprintf(layer_device[i], sizeof layer_device[i], "/dev/pmem%d", pmem++);
        snprintf(missing, sizeof missing, "template layer %d", i);
        if (access(layer_device[i], F_OK))
            return missing;
    }
    if (report_port < 0 && (report_port = open_port(REPORT_PORT)) < 0)
        return "virtio-serial port " REPORT_PORT;
    if (control_port < 0 && (control_port = open_port(CONTROL_PORT)) < 0)
        return "virtio-serial port " CONTROL_PORT;
    if (agent_port < 0 && (agent_port = open_port(AGENT_PORT)) < 0)
        return "virtio-serial port " AGENT_PORT;
    if (config("modules", 0) && !*modules_device)
        return "disk with the modules";
    return *delta_device ? NULL : "disk with the delta";
}

static int open_uevents(void) {
    struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
    int uevents = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
    if (uevents < 0 || bind(uevents, (struct sockaddr *)&address, sizeof address))
        give_up("cannot listen for devices: %m");
    return uevents;
}

static void wait_for_devices(int uevents) {
    const char *missing;
    while ((missing = find_devices())) {
        char event[4096];
        struct pollfd wait = {.fd = uevents, .events = POLLIN};
        if (poll(&wait, 1, DEVICE_TIMEOUT_MS) == 0)
            give_up("the %s is missing", missing);
        while (recv(uevents, event, sizeof event, MSG_DONTWAIT) > 0)
            ;
    }
    close(uevents);
}

static void mount_or_give_up(const char *what, const char *where, const char *type, unsigned long flags,
                             const char *options) {
    mkdir(where, 0755);
    if (mount(what, where, type, flags, options))
        give_up("cannot mount %s (%s) on %s: %m", what, type, where);
}

static void mount_layer(int layer, const char *where) {
    mkdir(where, 0755);
    if (!strcmp(config("layer", layer), "pmem") && !mount(layer_device[layer], where, "erofs", MS_RDONLY, "dax=always"))
        return;
    mount_or_give_up(layer_device[layer], where, "erofs", MS_RDONLY, "");
}

/* The very overlay that a container gets, on /new. It holds private clones of the mounts that it is made of. */
static void mount_overlay(void) {
    char options[MAX_LAYERS * 20 + 200] = "lowerdir=", where[20];
    int count = config_count("layer");
    for (int i = count - 1; i >= 0; i--) {
        snprintf(where, sizeof where, "/layer%d", i);
        mount_layer(i, where);
        strcat(strcat(options, where), i ? ":" : "");
    }
    mount_or_give_up(delta_device, "/delta", "ext4", MS_NOATIME, "discard");
    mkdir("/delta/upper", 0755);
    mkdir("/delta/work", 0755);
    strcat(options, ",upperdir=/delta/upper,workdir=/delta/work,redirect_dir=off,metacopy=off,index=off");
    mount_or_give_up("machine", "/new", "overlay", 0, options);
    for (int i = 0; i < count; i++) {
        snprintf(where, sizeof where, "/layer%d", i);
        umount2(where, MNT_DETACH);
    }
}

/* `NAME TARGET`: symbolic links below /run/systemd, which mask units and generators or want units. */
static void configure_systemd(void) {
    static const char *const folders[] = {"system", "system/getty.target.wants", "system-generators"};
    char path[300];
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) {
        snprintf(path, sizeof path, "/new/run/systemd/%s", folders[i]);
        mkdir(path, 0755);
    }
    for (int i = 0; config("link", i); i++) {
        char *name = config("link", i), *space = strchr(name, ' ');
        snprintf(path, sizeof path, "/new/run/systemd/%.*s", (int)(space - name), name);
        if (symlink(space + 1, path))
            say("cannot link %s: %m", path);
    }
}

static void mount_system_folders(void) {
    mount_or_give_up("run", "/new/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=20%");
    configure_networkd();
    mount_or_give_up("proc", "/new/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_or_give_up("sysfs", "/new/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mkdir("/new/dev", 0755);
    if (mount("/dev", "/new/dev", NULL, MS_MOVE, NULL))
        give_up("cannot move /dev: %m");
    mkdir("/new/dev/pts", 0755);
    mkdir("/new/dev/shm", 01777);
    mount_or_give_up("devpts", "/new/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
    mount_or_give_up("shm", "/new/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
}

/* Opening such a node loads its module (modules.devname of depmod(8)); udev, which would make them, need not run. */
static void make_module_nodes(const char *list) {
    char *text = read_file(list, NULL), path[100] = "/new/dev/", kind;
    unsigned major, minor;
    for (char *line = text ? strtok(text, "\n") : NULL; line; line = strtok(NULL, "\n")) {
        char *name = path + strlen("/new/dev/");
        if (sscanf(line, "%*63s %63s %c%u:%u", name, &kind, &major, &minor) != 4 || strstr(name, ".."))
            continue;
        for (char *slash = strchr(name, '/'); slash; slash = strchr(slash + 1, '/')) {
            *slash = 0;
            mkdir(path, 0755);
            *slash = '/';
        }
        mknod(path, (kind == 'b' ? S_IFBLK : S_IFCHR) | 0600, makedev(major, minor));
    }
    free(text);
}

/* Modules that the machine itself brings for this kernel go before the pack's. */
static void mount_modules(void) {
    struct utsname kernel;
    char device[40], folder[200], list[250];
    uname(&kernel);
    snprintf(device, sizeof device, "/new%s", modules_device);
    snprintf(folder, sizeof folder, "/new/lib/modules/%s", kernel.release);
    snprintf(list, sizeof list, "%s/modules.dep", folder);
    mkdir("/new/lib/modules", 0755);
    mkdir(folder, 0755);
    if (access(list, F_OK) && mount(device, folder, "erofs", MS_RDONLY, ""))
        say("cannot mount the kernel's modules on %s: %m", folder + strlen("/new"));
    snprintf(list, sizeof list, "%s/modules.devname", folder);
    make_module_nodes(list);
}

static void remember_delta(void) {
    struct stat disk;
    char numbers[40];
    if (stat(delta_device, &disk))
        return;
    snprintf(numbers, sizeof numbers, "%u:%u\n", major(disk.st_rdev), minor(disk.st_rdev));
    write_file(DELTA_FILE, numbers, strlen(numbers), 0600);
}

static void prepare_hidden_root(bool app) {
    unlink("/dev/console");
    rmdir("/dev");
    if (symlink(app ? "/new" : "/proc/1/root", "/machine") || symlink("/machine/dev", "/dev"))
        give_up("cannot prepare the hidden root: %m");
    chmod("/", 0755); /* dropbear trusts no keys below a folder that others may write */
    mkdir("/.ssh", 0700);
    write_file("/.ssh/authorized_keys", config("authorized", 0) ?: "", config_size("authorized"), 0600);
    write_file("/etc/host_key", config("hostkey", 0) ?: "", config_size("hostkey"), 0600);
}

static bool init_is_systemd(void) {
    char target[256];
    ssize_t length = readlink("/new/sbin/init", target, sizeof target - 1);
    if (length < 0)
        length = readlink("/new/usr/sbin/init", target, sizeof target - 1);
    target[length < 0 ? 0 : length] = 0;
    return strstr(target, "systemd");
}

static void switch_to_init(bool systemd) {
    if (systemd) { /* it pivots to /run/initramfs at its end and runs `shutdown` there */
        static const char *const folders[] = {"/exit", "/exit/oldroot", "/exit/proc", "/exit/sys", "/exit/dev", "/exit/run"};
        for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
            mkdir(folders[i], 0755);
        link("/init", "/exit/shutdown");
        mkdir("/new/run/initramfs", 0755);
        if (mount("/exit", "/new/run/initramfs", NULL, MS_BIND, NULL))
            say("cannot mount the exit hook: %m");
    }
    report(FRAME_READY, "", 0);
    if (chdir("/new") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        give_up("cannot switch to the machine's root: %m");
    execl("/sbin/init", "init", (char *)NULL);
    give_up("cannot run /sbin/init of the template: %m");
}

static void boot(void) {
    mount_or_give_up("proc", "/proc", "proc", 0, NULL);
    mount_or_give_up("sysfs", "/sys", "sysfs", 0, NULL);
    mount_or_give_up("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int uevents = open_uevents();
    read_config();
    bool app = !strcmp(config("init", 0) ?: "", "app");
    load_modules("/modules/base");
    if (uses_pmem())
        load_modules("/modules/pmem");
    if (config("emulated", 0))
        load_modules("/modules/emulated");
    if (config("network", 0) || config("card", 0))
        load_modules("/modules/network");
    if (!app)
        load_modules("/modules/system");
    if (!config("attached", 0))
        load_modules("/modules/memory");
    wait_for_devices(uevents);
    mount_overlay();
    remember_delta();
    bool systemd = init_is_systemd();
    /* Unmounting the overlay then puts the ext4 away. Other inits cannot unmount their root: the agent needs the path. */
    if (app || systemd)
        umount2("/delta", MNT_DETACH);
    sethostname(config("hostname", 0) ?: "machine", strlen(config("hostname", 0) ?: "machine"));
    configure_network();
    mount_system_folders();
    if (systemd)
        configure_systemd();
    configure_names();
    configure_resolver();
    if (*modules_device)
        mount_modules();
    plug_devices();
    prepare_hidden_root(app);
    start_agent(agent_port, app);
    if (app)
        run_app();
    switch_to_init(systemd);
}

int main(int argc, char **argv) {
    const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    if (!strcmp(name, "shutdown"))
        return exit_hook(argc, argv);
    if (getpid() != 1)
        return login_shell(argc, argv);
    boot();
}
