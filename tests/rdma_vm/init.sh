#!/busybox sh
# The guest's first process: the host's files as they are, writes lost, and one folder that both sides write to.
b=/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do $b insmod "/modules/$module" || echo "guest: no $module"; done
share() { $b mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" || { echo "guest: no $1"; $b poweroff -f; }; }
share host /host ro,cache=loose
$b mount -t tmpfs tmpfs /overlay
$b mkdir /overlay/up /overlay/work
$b mount -t overlay -o lowerdir=/host,upperdir=/overlay/up,workdir=/overlay/work overlay /new || $b poweroff -f
for part in proc sys dev; do $b mkdir -p "/new/$part"; $b mount --move "/$part" "/new/$part"; done
for part in run dev/shm; do $b mkdir -p "/new/$part"; $b chroot /new /bin/mount -t tmpfs -o mode=1777 tmpfs "/$part"; done
$b mkdir -p /new/run/job /new/dev/pts
share job /new/run/job cache=none
exec $b chroot /new /usr/bin/env -i HOME=/root TERM=dumb PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /bin/sh /run/job/start
