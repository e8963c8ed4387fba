"""What the first boot runs in a machine without cloud-init: small scripts for any POSIX shell.

Each takes its values as arguments or on standard input, never in its text, and can be run again after it was
interrupted anywhere. They use what the template brings (shadow, BusyBox) and write passwd(5), group(5) and shadow(5)
line by line where it brings nothing.
"""

from __future__ import annotations

# Succeeds when the machine's own init is done: before that, /tmp and its like are mounted over what others do.
READY = r"""
case "$(readlink -f /sbin/init)" in */systemd) ;; *) exit 0 ;; esac
case "$(systemctl is-system-running 2>/dev/null)" in running | degraded | maintenance) exit 0 ;; esac
echo "its init is still starting"
exit 75
"""

# Arguments: name, shell, groups separated by commas, hash of a password, and `sudo` or nothing.
USER = r"""
set -eu
name=$1 shell=$2 groups=$3 hash=$4 sudo=$5
has() { command -v "$1" >/dev/null 2>&1; }
known() { grep -q "^$2:" "$1" 2>/dev/null; }
add_line() {
    if [ -s "$1" ] && [ -n "$(tail -c 1 "$1")" ]; then echo >> "$1"; fi
    printf '%s\n' "$2" >> "$1"
}
free_id() {
    id=1000
    while cut -d: -f3 /etc/passwd /etc/group 2>/dev/null | grep -qx "$id"; do id=$((id + 1)); done
    echo "$id"
}
add_group() {
    known /etc/group "$1" && return
    if has groupadd; then groupadd "$1"
    elif has addgroup; then addgroup "$1"
    else add_line /etc/group "$1:x:$(free_id):"
    fi
}
if [ -z "$shell" ]; then
    shell=/bin/sh
    if [ -x /bin/bash ]; then shell=/bin/bash; fi
fi
if ! known /etc/passwd "$name"; then
    if has useradd; then
        if known /etc/group "$name"; then useradd -m -s "$shell" -g "$name" "$name"
        else useradd -m -U -s "$shell" "$name"
        fi
    elif has adduser; then adduser -D -s "$shell" "$name"
    else
        id=$(free_id)
        known /etc/group "$name" || add_line /etc/group "$name:x:$id:"
        gid=$(grep "^$name:" /etc/group | cut -d: -f3)
        if [ -e /etc/shadow ] && ! known /etc/shadow "$name"; then add_line /etc/shadow "$name:!::0:99999:7:::"; fi
        add_line /etc/passwd "$name:x:$id:$gid::/home/$name:$shell"
    fi
fi
home=$(grep "^$name:" /etc/passwd | cut -d: -f6)
ids=$(grep "^$name:" /etc/passwd | cut -d: -f3,4)
if [ ! -d "$home" ]; then
    mkdir -p "$home"
    chmod 755 "$home"
    chown "$ids" "$home"
fi
for group in $(printf '%s' "$groups" | tr ',' ' '); do
    add_group "$group"
    members=$(grep "^$group:" /etc/group | cut -d: -f4)
    case ",$members," in *",$name,"*) continue ;; esac
    if has usermod; then usermod -a -G "$group" "$name"
    elif has addgroup; then addgroup "$name" "$group"
    else sed -i "s/^$group:.*/&${members:+,}$name/" /etc/group
    fi
done
if [ -n "$hash" ]; then
    if has chpasswd; then printf '%s:%s\n' "$name" "$hash" | chpasswd -e
    else
        touch /etc/shadow
        chmod o-rwx /etc/shadow
        known /etc/shadow "$name" || add_line /etc/shadow "$name:!::0:99999:7:::"
        # A hash has no | in it (crypt(5)).
        sed -i "s|^$name:[^:]*:|$name:$hash:|" /etc/shadow
    fi
fi
if [ "$sudo" = sudo ]; then
    if has doas && ! has sudo; then
        mkdir -p /etc/doas.d
        echo "permit nopass $name" > "/etc/doas.d/$name.conf"
    else
        [ -d /etc/sudoers.d ] || mkdir -p -m 750 /etc/sudoers.d
        (umask 226; rm -f "/etc/sudoers.d/90-$name"; echo "$name ALL=(ALL) NOPASSWD:ALL" > "/etc/sudoers.d/90-$name")
    fi
fi
"""

# Argument: the user. Standard input: public keys, one a line.
SSH_KEYS = r"""
set -eu
entry=$(grep "^$1:" /etc/passwd) || { echo "there is no user $1" >&2; exit 1; }
home=$(printf '%s' "$entry" | cut -d: -f6)
ids=$(printf '%s' "$entry" | cut -d: -f3,4)
mkdir -p "$home/.ssh"
chmod 700 "$home/.ssh"
file=$home/.ssh/authorized_keys
touch "$file"
chmod 600 "$file"
while IFS= read -r key; do
    grep -qxF -e "$key" "$file" || printf '%s\n' "$key" >> "$file"
done
chown "$ids" "$home/.ssh" "$file"
"""

# Arguments: path, mode, owner. Standard input: the content. The file appears whole.
FILE = r"""
set -eu
if [ -d "$1" ]; then echo "$1 is a directory" >&2; exit 1; fi
mkdir -p "$(dirname "$1")"
new=$1.triarch-new
(umask 077; cat > "$new")
chown "$3" "$new"
chmod "$2" "$new"
mv -f "$new" "$1"
"""

# Arguments: packages.
PACKAGES = r"""
set -eu
has() { command -v "$1" >/dev/null 2>&1; }
export DEBIAN_FRONTEND=noninteractive
if has apt-get; then
    apt-get -q update
    apt-get -q -y --no-install-recommends install "$@"
elif has apk; then apk add "$@"
elif has dnf; then dnf -y install "$@"
elif has microdnf; then microdnf -y install "$@"
elif has yum; then yum -y install "$@"
elif has zypper; then zypper --non-interactive install "$@"
else
    echo "no package manager is in this template: there is none of apt-get, apk, dnf, microdnf, yum, zypper" >&2
    exit 69
fi
"""
