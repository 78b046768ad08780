<?php
$rounds = ROUNDS; $seen = []; $hash = "x";
for ($i = 0; $i < $rounds; $i++) {
    $hash = hash("sha256", $hash . $i);
    $key = substr($hash, 0, 2);
    $seen[$key] = ($seen[$key] ?? 0) + 1;
    if ($i % intdiv($rounds, 10) == 0) echo "$i $hash\n";
}
ksort($seen);
echo array_sum($seen), " ", $seen["00"], " ", $hash, "\n";
